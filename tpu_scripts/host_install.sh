#!/usr/bin/env bash
#
# Runs on a TPU host, sent and started by setup.sh; it can be started again at any point.
#
# host_install.sh DIGEST   installs the code beside this file: into ~/jaxtune-code, with an
#                          environment in ~/jaxtune-env. Ends with a line "jaxtune-host installed DIGEST".

set -euo pipefail
digest=$1
new=$(cd "$(dirname "$0")/.." && pwd)
code=$HOME/jaxtune-code env=$HOME/jaxtune-env

if [ "$(cat "$env/.digest" 2>/dev/null)" = "$digest" ]; then
  rm -rf "$new"
  echo "jaxtune-host installed $digest"
  exit 0
fi
if [ -e "$code/tpu_scripts/host_run.sh" ] && bash "$code/tpu_scripts/host_run.sh" status | grep -q ' running '; then
  rm -rf "$new"
  echo "a run is going on here, so its code stays; try: tpu_scripts/run.sh NAME --zone=ZONE --stop" >&2
  exit 3
fi

# What the last setup brought and this one does not must not be imported; what runs wrote stays.
mkdir -p "$code"
if [ -e "$code/.files" ]; then
  (cd "$code" && while IFS= read -r file; do rm -f -- "$file"; done <.files)
fi
(cd "$new" && find . -type f) >"$new/.files"
cp -R "$new/." "$code/"
rm -rf "$new" "$code/build"

# Images of most generations carry Python 3.10; uv brings a newer one without root or apt.
if [ ! -x "$env/bin/python" ]; then
  rm -rf "$env"
  if python3 -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python3 -m venv "$env"
  else
    PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || python3 -m pip install --user --quiet uv ||
      curl --fail --silent --show-error --location https://astral.sh/uv/install.sh | sh
    uv venv --quiet --seed --python 3.11 "$env"
  fi
fi
cd "$code"
"$env/bin/python" -m pip install --quiet --disable-pip-version-check --retries 8 \
  --constraint constraints.txt '.[tpu]'
# The same version with other code inside: pip would keep the old one.
"$env/bin/python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps .
"$env/bin/jaxtune" --version
printf '%s\n' "$digest" >"$env/.digest"
echo "jaxtune-host installed $digest"
