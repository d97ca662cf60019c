# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Put the links of the bundles in place: what is the same in many bundles is one file that they link to.

  python tools/links.py              # where Git wrote a text, or nothing is: a link, or a copy where there can be none
  python tools/links.py --refresh    # also where a copy is not what it is a copy of (any more)
  python tools/links.py --undo       # copies become the texts that Git writes, so that Git sees no change

Git on Windows, some network drives and programs that unpack a zip write the text of a link instead of the link. After a
pull on such a machine, --refresh brings the copies up to date. In a new bundle's folder, which holds its own
configs/pretrain.yaml, this makes the links. It needs nothing but Python.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.commanding.ending import end, tool_command
from tools.linking.links import LEFT_ALONE, place, undo


def links() -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--refresh", action="store_true", help="also replace copies that are out of date or changed")
    choice.add_argument("--undo", action="store_true", help="put the texts of the links in the place of copies")
    parser.add_argument("--copies", action="store_true", help="copy even where links can be made")
    given = parser.parse_args()
    lines = undo() if given.undo else place(refresh=given.refresh, copies=given.copies)
    print("\n".join(lines) or "all links are in place")
    if any(line.startswith(LEFT_ALONE) for line in lines):
        end(following=tool_command("links", "--refresh"))
    else:
        end(following="git status" if given.undo else tool_command("quickstart"))


if __name__ == "__main__":
    links()
