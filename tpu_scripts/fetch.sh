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
# Exit codes: 0 all of it is here; 1 it is not; 2 wrong usage.

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
    [ "$DRY" = 1 ] || mkdir -p "$TO"
    # rsync, so that the same command goes on after a broken connection.
    attempt gc storage rsync --recursive "$FROM" "$TO" ${project[@]+"${project[@]}"} --quiet ||
      die 1 "not all of $(quote "$FROM") is in $(quote "$TO")" "the same command again: it goes on where it stopped"
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

# One stream; a cut one does not unpack, so half a folder is never taken for all of it.
bring() {
  rm -rf "$TO.partial"
  mkdir -p "$TO.partial"
  remote "$node" "$WORKER" "$PACK" | tar -xf - -C "$TO.partial"
}
attempt bring || {
  rm -rf "$TO.partial"
  die 1 "$(quote "$FROM") did not come from host $WORKER of $node" "the path (relative to ~/jaxtune-code), then the same command again"
}
mv "$TO.partial" "$TO"
say "$(quote "$FROM") of host $WORKER of $node is in $(quote "$TO")"
