# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Look at data, choose what to pre-train on, and split it.

  python tools/prepare_data.py scan FOLDER                          # what is there, from headers alone; writes nothing
  python tools/prepare_data.py scan FOLDER --output report          # also report/scan.json and report/scan.png
  python tools/prepare_data.py list FOLDER --output datalist.json --modality T1w,T2w --max_quality_score 3

FOLDER is any folder of volumes, a BIDS data set, the OpenMind data set, or a file: nnssl's pretrain_data.json,
OpenMind's table, a MONAI datalist. --help after a command explains its settings.
"""

from __future__ import annotations

from environment import RUNTIME, ensure

if __name__ == "__main__":
    ensure(RUNTIME)
    import fire
    from scan_data import list_cases, scan

    fire.Fire({"scan": scan, "list": list_cases})
