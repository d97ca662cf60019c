# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Look at data, choose what to pre-train on, prepare it ahead of time on as many machines as there are, and check it.

  python tools/prepare_data.py scan FOLDER                          # what is there, from headers alone; writes nothing
  python tools/prepare_data.py scan FOLDER --output report          # also report/scan.json and report/scan.png
  python tools/prepare_data.py list FOLDER --output datalist.json --modality T1w,T2w --max_quality_score 3
  python tools/prepare_data.py prepare FOLDER --store_dir /data/store --num_workers 16
  python tools/prepare_data.py verify /data/store

FOLDER is any folder of volumes, a BIDS data set, the OpenMind data set, or a file: nnssl's pretrain_data.json,
OpenMind's table, a MONAI datalist. --help after a command explains its settings; docs/data.md tells the whole of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.commanding.environment import RUNTIME, ensure

if __name__ == "__main__":
    ensure(RUNTIME)
    from tools.commanding.commands import run
    from tools.preparing.filling import prepare, verify
    from tools.preparing.scanning import list_cases, scan

    run({"scan": scan, "list": list_cases, "prepare": prepare, "verify": verify}, sys.argv[1:])
