#!/bin/sh
# Install megamoe into .venv: `tools/install.sh .`, or ".[dev]" with what tests need. make calls it in the checkout.
#
# .venv is made, with $PYTHON (by default python3), where there is none, or none with a Python that megamoe runs on, or
# one with another version than that of a given $PYTHON. Else it is kept: its user may have put torch's CPU build there.
set -eu

refuse() {
  echo "error: $1" >&2
  exit 2
}
recent='import sys; sys.exit(sys.version_info < (3, 10))'
other='name another: make train PYTHON=/usr/bin/python3.12'
python=${PYTHON:-python3}
bin=$(pwd -P)/.venv/bin: # each make has put it there, and an activated .venv
while [ "${PATH#"$bin"}" != "$PATH" ]; do PATH=${PATH#"$bin"}; done
exec 9< "$0" && flock 9 # one at a time in a checkout

if ! .venv/bin/python -c "$recent" 2> /dev/null ||
  { [ -n "${PYTHON:-}" ] && [ "$(.venv/bin/python --version)" != "$("$python" --version 2>&1)" ]; }; then
  command -v "$python" > /dev/null || refuse "there is no $python; install Python 3.10 or newer, or $other"
  "$python" -c "$recent" || refuse "$python is $("$python" --version 2>&1), but megamoe needs 3.10 or newer; install one, or $other"
  "$python" -c 'import ensurepip, venv' 2> /dev/null ||
    refuse "$python lacks venv or ensurepip; install them (Debian, Ubuntu: apt install python3-venv), or $other"
  rm -rf .venv
  "$python" -m venv .venv
fi
.venv/bin/python -m pip --version > /dev/null 2>&1 || .venv/bin/python -m ensurepip > /dev/null

# A package without INSTALLER is one at which pip was interrupted; pip would take it for installed.
find .venv/lib/ -maxdepth 3 -name '*.dist-info' ! -exec test -e '{}/INSTALLER' ';' -exec rm -r '{}' +
echo "Installing $1 into .venv: minutes without a word, and up to 6 GB where pip takes torch's CUDA build."
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$1" ||
  refuse "pip could not install megamoe, for the reason above; try again when there is a network and space on the disk, \
and what is installed stays; if torch is not built for this Python, $other"
