# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Score predicted segmentations against references, whoever made them: Dice, NSD, HD95 and volume error.

  python tools/evaluate.py PREDICTIONS REFERENCES                # two folders of NIfTI label maps of the same names
  python tools/evaluate.py prediction.nii.gz reference.nii.gz    # two files
  python tools/evaluate.py PREDICTIONS REFERENCES --labels "['background','edema','core']"
  python tools/evaluate.py PREDICTIONS REFERENCES --labels "['background','a','b']" --regions "{'both':[1,2],'b':[2]}"
  python tools/evaluate.py PREDICTIONS REFERENCES --groups cases.csv --group centre,sex,age:40,60 --patient patient

It prints the means over cases with 95 % bootstrap intervals, and writes scores.csv (a row for each case and class),
scores.json (also the means, for all and for each group, what was left out and why), scores.png and report.html, a page
with the best and the worst case to look through. Distances are in mm and volumes in ml, from the files' headers.
Without --labels, the values in the references are the classes.

A case without its prediction, on another grid, or that is no label map is named, left out of the means and listed in
scores.json. The exit status is 1 if nothing could be scored.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.running import main
from tools.scoring.settings import Evaluate

__all__ = ["evaluate"]


def evaluate(settings: Evaluate) -> None:
    """Score predictions."""
    from tools.scoring.evaluate import evaluate as run

    run(settings)


if __name__ == "__main__":
    main(evaluate, __doc__)
