#!/usr/bin/env bash
#
# fetch.sh NAME --zone=ZONE --from=PATH --to=FOLDER
# fetch.sh --from=gs://BUCKET/FOLDER --to=FOLDER
#
# Brings a folder back: from the disk of a host, or from a bucket (no slice is needed for that).
#
#   --from=PATH        on the host, relative to ~/jaxtune-code; or gs://...
#   --to=FOLDER        here; from a host it must not exist yet, from a bucket what is there is kept
#   --worker=I         the host, by default 0
#   --node=I           the slice, where there are several; by default 0
#   --node-count=N     as it was made
#   --project=ID       by default gcloud's own
#   --dry-run          print the commands, run nothing
#
# Exit codes: 0 all of it is here; 1 it is not; 2 wrong usage, or no such slice; 69 the slice is not READY.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

FROM='' TO='' WORKER=0 NODE=0
for option; do
  case $option in
    --from=*) FROM=${option#*=} ;;
    --to=*) TO=${option#*=} ;;
    --worker=*) WORKER=${option#*=} ;;
    --node=*) NODE=${option#*=} ;;
    *) take_common "$option" ;;
  esac
done
[ -n "$FROM" ] || die 2 "there is no --from" "--from=runs/mine or --from=gs://BUCKET/FOLDER"
[ -n "$TO" ] || die 2 "there is no --to" "--to=FOLDER"
case $TO in -*) TO=./$TO ;; gs://*) die 2 "--to is a bucket" "gcloud storage cp" ;; esac

case $FROM in
  gs://*)
    check_gs "$FROM"
    project=()
    [ -z "$PROJECT" ] || project=("--project=$PROJECT")
    made=0
    [ "$DRY" = 1 ] || [ -d "$TO" ] || { mkdir -p "$TO" && made=1; }
    # rsync, so that the same command goes on after a broken connection.
    attempt gc storage rsync --recursive "$FROM" "$TO" ${project[@]+"${project[@]}"} --quiet || {
      if grep -Eiq 'did not find existing container|matched no objects|not found|does not exist|[^0-9]404' "$LAST"; then
        [ "$made" = 0 ] || rmdir "$TO" 2>/dev/null || true
        die 1 "there is nothing at $(quote "$FROM")" "gcloud storage ls $(quote "$(printf '%s' "$FROM" | cut -d / -f 1-3)")"
      fi
      die 1 "not all of $(quote "$FROM") is in $(quote "$TO")" "the same command again: it goes on where it stopped"
    }
    [ "$DRY" = 1 ] || say "$(quote "$FROM") is in $(quote "$TO")"
    exit 0
    ;;
esac

check_common
need '[0-9]{1,4}' "$WORKER" "the worker" "--worker=0"
need '[0-9]{1,4}' "$NODE" "the slice" "--node=0"
[ "$NODE" -lt "$NODE_COUNT" ] || die 2 "there is no slice $NODE of $NODE_COUNT" "--node-count as it was made"
[ ! -e "$TO" ] || die 2 "$(quote "$TO") exists" "another --to"
node=$(nodes | sed -n "$((NODE + 1))p")

TO=${TO%/}
case $FROM in
  /*) PACK="tar -cf - -C $(quote "$FROM") ." ;;
  *) PACK="cd jaxtune-code && tar -cf - -C $(quote "./$FROM") ." ;;
esac
if [ "$DRY" = 1 ]; then
  remote "$node" "$WORKER" "$PACK"
  exit 0
fi

need_node "$node"
[ "$WORKER" -lt "$WORKERS" ] || die 2 "$node has no host $WORKER" "--worker=0 to --worker=$((WORKERS - 1))"

# One stream; a cut one does not unpack, so half a folder is never taken for all of it.
bring() {
  rm -rf "$TO.partial"
  mkdir -p "$TO.partial"
  remote "$node" "$WORKER" "$PACK" | tar -xf - -C "$TO.partial"
}
attempt bring || {
  rm -rf "$TO.partial"
  if grep -q 'jaxtune-code: No such file' "$LAST"; then
    die 1 "nothing is installed on host $WORKER of $node" "tpu_scripts/setup.sh $SAME, or an absolute --from"
  elif grep -Eq 'tar: .*No such file' "$LAST"; then
    die 1 "there is no $(quote "$FROM") on host $WORKER of $node" \
      "another --from (relative to ~/jaxtune-code) or --worker; a --workdir on gs:// is fetched from there"
  fi
  die 1 "$(quote "$FROM") did not come from host $WORKER of $node" "the same command again, then tpu_scripts/logs.sh $SAME"
}
mv "$TO.partial" "$TO"
say "$(quote "$FROM") of host $WORKER of $node is in $(quote "$TO")"
