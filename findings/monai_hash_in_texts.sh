#!/usr/bin/env bash
# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
# What a text of a MONAI bundle's config is after it was read: "#" and the word "import" change what it says.
#
#   bash findings/monai_hash_in_texts.sh                 # installs monai into a temporary folder (with torch, 1 GB or more)
#   PYTHON=.venv/bin/python bash findings/monai_hash_in_texts.sh      # or takes an environment that has this version
set -euo pipefail
VERSION=1.6.1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv "$work/venv"
  PYTHON="$work/venv/bin/python"
  "$PYTHON" -m pip install --quiet "monai==$VERSION" "pyyaml==6.0.3"
fi
cat > "$work/config.json" <<'END'
{"dataset_dir": "/data/run#2", "labels": ["background", "lesion #1"], "other": "@labels",
 "names": "$@labels + ['important']"}
END
"$PYTHON" -W ignore - "$work/config.json" "$VERSION" <<'END'
import sys
import monai
from monai.bundle import ConfigParser

file, version = sys.argv[1:]
assert monai.__version__ == version, f"this is monai {monai.__version__}, not {version}; see whether it is as below"
parser = ConfigParser()
parser.read_config(file)
found = {}
try:
    parser.get_parsed_content("labels")
except SyntaxError as error:
    found["an expression that refers to another name and holds 'import'"] = f"SyntaxError: {error.msg}"
del parser.config["names"]
parser.parse(reset=True)
found |= {name: parser.get_parsed_content(name) for name in ("dataset_dir", "labels")}
print(f"monai {version}, ConfigParser:")
for name, value in found.items():
    print(f"  {name}: {value!r}")
assert found == {
    "an expression that refers to another name and holds 'import'": "SyntaxError: invalid syntax",
    "dataset_dir": "/data/run::2",
    "labels": ["background", "lesion ::1"],
}, "this has changed"
print("most expect: '/data/run#2' and ['background', 'lesion #1'], since neither is a reference; and the expression's value")
print("why it matters: a folder with # is not found, a class is called otherwise in training than in the file that names it,")
print("  and one class with the letters 'import' makes every name of the config unreadable, also those that do not use it")
END
