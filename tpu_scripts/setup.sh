#!/usr/bin/env bash
#
# setup.sh NAME --zone=ZONE [options]
#
# Installs this checkout, Python 3.11 where the image's is older, and what jaxtune needs, on every host
# of a slice. Safe to repeat: hosts that have it already answer at once.
#
#   --with=PATH        also copy this file or folder of the checkout (a config, rows.jsonl); repeatable
#   --hf-token         copy your Hugging Face token ($HF_TOKEN, else the file `hf auth login` wrote) to
#                      each host, through stdin into a file only you can read: for gated models
#   --node-count=N     as it was made
#   --project=ID       by default gcloud's own
#   --dry-run          print the commands, run nothing
#
# Exit codes: 0 installed everywhere; 1 failed on a host; 2 wrong usage; 69 the slice cannot be reached.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

root=$(dirname "$here")
WITH=() TOKEN=0
for option; do
  case $option in
    --with=*) WITH+=("${option#*=}") ;;
    --hf-token) TOKEN=1 ;;
    *) take_common "$option" ;;
  esac
done
check_common

for path in ${WITH[@]+"${WITH[@]}"}; do
  case /$path/ in
    *$'\n'*) die 2 "$(quote "$path") has a line break in its name" "another name" ;;
    */../* | //*) die 2 "$(quote "$path") is not inside the checkout" "a path relative to $root, or gs:// in the config" ;;
    /-*) die 2 "$(quote "$path") would be read as an option" "--with=./${path}" ;;
  esac
  [ -e "$root/$path" ] || die 2 "there is no $(quote "$path") in $root" "--with=PATH relative to it"
done

# Never an argument, never printed: it goes from here through a pipe.
token() {
  local file="${HF_TOKEN_PATH:-${HF_HOME:-$HOME/.cache/huggingface}/token}"
  if [ -n "${HF_TOKEN:-}" ]; then
    printf '%s' "$HF_TOKEN"
  elif [ -s "$file" ]; then
    cat "$file"
  else
    die 2 "there is no Hugging Face token in \$HF_TOKEN or $(quote "$file")" "hf auth login"
  fi
}
[ "$TOKEN" = 0 ] || token >/dev/null

pack() {
  # macOS would add files of its own to the archive.
  (cd "$root" && COPYFILE_DISABLE=1 tar --exclude=__pycache__ -cf - \
    jaxtune configs tpu_scripts pyproject.toml constraints.txt README.md LICENSE \
    ${WITH[@]+"${WITH[@]}"}) >"$TMP/code.tar"
  DIGEST=$(cd "$root" && find jaxtune configs tpu_scripts pyproject.toml constraints.txt \
    ${WITH[@]+"${WITH[@]}"} -type f ! -path '*/__pycache__/*' -exec cksum {} + | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
  gzip -c "$TMP/code.tar" >"$TMP/jaxtune-code.tgz"
}

copy() { gc compute tpus tpu-vm scp "$TMP/jaxtune-code.tgz" "$1:jaxtune-code.tgz" "${WHERE[@]}" --worker=all; }

install_command() {
  echo "rm -rf jaxtune-code.new && mkdir jaxtune-code.new && tar -C jaxtune-code.new -xzf jaxtune-code.tgz" \
    "&& bash jaxtune-code.new/tpu_scripts/host_install.sh $DIGEST"
}

# A pipe into --worker=all would reach one host only.
send_token() {
  if [ "$DRY" = 1 ]; then write_token "$@"; else token | write_token "$@"; fi
}

write_token() {
  gc compute tpus tpu-vm ssh "$1" "${WHERE[@]}" "--worker=$2" --ssh-flag=-oServerAliveInterval=15 \
    '--command=umask 077 && mkdir -p .cache/huggingface && rm -f .cache/huggingface/token && cat >.cache/huggingface/token'
}

unfinished() {
  costs
  die 1 "$1" "tpu_scripts/setup.sh $SAME again: it goes on where it stopped"
}

# shellcheck disable=SC2034 # for the trap
INTERRUPTED="some hosts may be set up and others not; the same command goes on"
trap interrupted INT TERM HUP
pack
need_ready
[ "$DRY" = 1 ] || say "installing on every host of $NAME (two to four minutes)"
for node in $(nodes); do
  attempt copy "$node" || unfinished "the code did not reach every host of $node"
done
if ! everywhere "$(install_command)"; then
  if grep -q 'a run is going on here' "$LAST"; then
    costs
    die 2 "$NAME is running other code than this checkout's" \
      "tpu_scripts/run.sh $SAME to attach, or with --stop to end it, then setup again"
  fi
  unfinished "$NAME is set up on $(answered) only"
fi
if [ "$TOKEN" = 1 ]; then
  for node in $(nodes); do
    worker=0 workers=1
    [ "$DRY" = 1 ] || workers=$(cat "$TMP/workers.$node")
    while [ "$worker" -lt "$workers" ]; do
      attempt send_token "$node" "$worker" || unfinished "the Hugging Face token did not reach host $worker of $node"
      worker=$((worker + 1))
    done
  done
fi
[ "$DRY" = 0 ] || exit 0
say "$NAME is set up on $(answered); next: tpu_scripts/run.sh $SAME -- jaxtune train ..."
costs
