#!/bin/sh
# Makes the virtual environment of this project and installs it there (called by make).
# A torch that the chosen Python already has is kept when it is new enough; otherwise torch is
# installed first and alone, so that nothing else can pull in another build of it.
set -eu
PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv} TORCH=${TORCH:-torch==2.13.0}

"$PYTHON" - <<'PY' || exit 1
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"recurgolf needs Python 3.11 to 3.13, and {sys.executable} is {sys.version.split()[0]}; "
             "name another with: make PYTHON=python3.12 ...")
PY

suitable_torch='
import sys
try:
    import torch
except ImportError:
    sys.exit(1)
sys.exit(tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10))'

if [ ! -x "$VENV/bin/python" ]; then
  if "$PYTHON" -c "$suitable_torch" 2>/dev/null; then
    echo "setup: keeping the torch of $PYTHON"
    "$PYTHON" -m venv --system-site-packages "$VENV"
  else
    "$PYTHON" -m venv "$VENV"
  fi
fi
if ! "$VENV/bin/python" -c "$suitable_torch" 2>/dev/null; then
  echo "setup: installing $TORCH"
  "$VENV/bin/python" -m pip install --disable-pip-version-check -q "$TORCH"
fi
echo "setup: installing recurgolf"
"$VENV/bin/python" -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[demo,codecs,dev]'
