# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Prepare the data of pre-training ahead of time, on as many machines as there are, and check what was prepared.

  python tools/prepare_data.py prepare /data/mri --store_dir /data/store --num_workers 16
  python tools/prepare_data.py verify /data/store
  python tools/prepare_data.py prepare --help                            # all options of a command

docs/data.md tells the whole of it.
"""

from __future__ import annotations

import sys

from environment import ROOT, RUNTIME, ensure

if __name__ == "__main__":
    ensure(RUNTIME)
    sys.path.insert(0, str(ROOT))
    import fire
    from fill_store import prepare, verify

    from common.errors import end_in_a_sentence

    end_in_a_sentence()
    fire.Fire({"prepare": prepare, "verify": verify})
