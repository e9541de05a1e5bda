#!/usr/bin/env bash
#
# delete.sh NAME --zone=ZONE [--yes]
#
# Deletes a slice with its disks, or its place in the queue, after asking; then looks whether it is gone.
#
#   --yes              do not ask (for scripts)
#   --node-count=N     as it was made
#   --project=ID       by default gcloud's own
#   --dry-run          print the commands, run nothing
#
# Exit codes: 0 gone; 1 nothing there, not wanted, or still there; 2 wrong usage; 69 gcloud cannot be reached.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

YES=0
for option; do
  case $option in
    --yes) YES=1 ;;
    *) take_common "$option" ;;
  esac
done
check_common

# FOUND: what there is, one thing a line. A queued resource takes its nodes with it.
find_all() {
  local node
  FOUND=''
  describe_queue
  [ "$QUEUE" = ABSENT ] || FOUND="queue $NAME ${QUEUE:-?}"$'\n'
  for node in $(nodes); do
    describe "$node"
    [ "$STATE" = ABSENT ] || FOUND="${FOUND}node $node $STATE"$'\n'
  done
}

ask() {
  local answer=''
  printf '%s' "$FOUND" | sed "s/^/$PREFIX: /" >&2
  say "this deletes $NAME in $ZONE and everything on its disks; results on gs:// stay"
  printf 'type %s to delete it: ' "$NAME" >&2
  IFS= read -r answer || true
  if [ "$answer" != "$NAME" ]; then
    costs
    die 1 "not deleted" "the same command and the name, or --yes in a script"
  fi
}

# shellcheck disable=SC2034 # for the trap
INTERRUPTED="$NAME may still be there"
trap interrupted INT TERM HUP
find_all
if [ -z "$FOUND" ]; then
  die 1 "there is no $NAME in $ZONE$(others), so nothing was deleted; one in another zone or project goes on costing money" \
    "gcloud compute tpus tpu-vm list --zone=-, and --node-count where it has several slices"
fi
[ "$YES" = 1 ] || [ "$DRY" = 1 ] || ask

failed=0
while read -r kind what _; do
  case $kind in
    queue)
      look gc compute tpus queued-resources delete "$what" "${WHERE[@]}" --force || [ $? = 44 ] || failed=1
      ;;
    node)
      # The queued resource has taken its nodes with it.
      [ "$QUEUE" = ABSENT ] || [ "$failed" = 1 ] || [ "$DRY" = 1 ] || continue
      look gc compute tpus tpu-vm delete "$what" "${WHERE[@]}" || [ $? = 44 ] || failed=1
      ;;
  esac
done <<<"${FOUND%$'\n'}"
[ "$DRY" = 0 ] || exit 0

find_all
if [ -n "$FOUND" ]; then
  printf '%s' "$FOUND" | sed "s/^/$PREFIX: still there: /" >&2
  costs
  die 1 "$NAME is still there" "the same command again, then console.cloud.google.com/compute/tpus"
fi
say "$NAME is gone and costs nothing any more"
