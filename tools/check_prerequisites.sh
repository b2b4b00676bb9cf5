# Called by `make setup` before anything is installed: says what this machine lacks.
# Reads PYTHON, UPSTREAM (Detectron2's repository) and DETECTRON2 (what to install it from).

fail() {
  echo "$@" >&2
  exit 1
}

command -v "$PYTHON" >/dev/null || fail "There is no $PYTHON. Name a Python: make PYTHON=python3.12 ..."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail \
  "fcos_d2 needs Python 3.10 or newer; $PYTHON is $("$PYTHON" --version 2>&1)." \
  "Name another one: make PYTHON=python3.12 ..."
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail \
  "$PYTHON cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"

case "$DETECTRON2" in
  *.whl) exit 0 ;; # nothing to compile or to fetch
esac
command -v c++ >/dev/null || command -v g++ >/dev/null || fail \
  "Detectron2 is compiled on this machine, which needs a C++ compiler: none found." \
  "On Debian and Ubuntu: apt-get install g++"
"$PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || fail \
  "Detectron2 is compiled on this machine, which needs the headers of $PYTHON: no Python.h." \
  "On Debian and Ubuntu: apt-get install python3-dev"

case "$DETECTRON2" in
  "git+$UPSTREAM"*)
    command -v git >/dev/null || fail "Detectron2 is fetched with git, which is not installed."
    git ls-remote -q "$UPSTREAM" HEAD >/dev/null 2>&1 || fail \
      "Cannot reach Detectron2's upstream repository $UPSTREAM." \
      "On a machine without access to it, name a folder, wheel or URL that holds Detectron2:" \
      "make DETECTRON2=/path/to/detectron2 ..."
    ;;
esac
