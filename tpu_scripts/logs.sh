#!/usr/bin/env bash
#
# logs.sh NAME --zone=ZONE [options]
#
# Shows the log of the newest run on a slice.
#
#   --worker=I         the host, by default 0
#   --node=I           the slice, where there are several; by default 0
#   --all              every host, each line after the host's name
#   --lines=N          how many, by default 200
#   --follow           go on until the run ends (one host)
#   --node-count=N     as it was made
#   --project=ID       by default gcloud's own
#   --dry-run          print the commands, run nothing
#
# Exit codes: 0 shown; 1 there is no run; 2 wrong usage; 69 the hosts cannot be reached.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

WORKER=0 NODE=0 ALL=0 LINES_SHOWN=200 FOLLOW=0
for option; do
  case $option in
    --worker=*) WORKER=${option#*=} ;;
    --node=*) NODE=${option#*=} ;;
    --lines=*) LINES_SHOWN=${option#*=} ;;
    --all) ALL=1 ;;
    --follow) FOLLOW=1 ;;
    *) take_common "$option" ;;
  esac
done
check_common
need '[0-9]{1,4}' "$WORKER" "the worker" "--worker=0"
need '[0-9]{1,4}' "$NODE" "the slice" "--node=0"
need '[1-9][0-9]{0,8}' "$LINES_SHOWN" "the number of lines" "--lines=200"
[ "$NODE" -lt "$NODE_COUNT" ] || die 2 "there is no slice $NODE of $NODE_COUNT" "--node-count as it was made"
[ "$ALL$FOLLOW" != 11 ] || die 2 "--follow with --all" "one host with --worker=I --follow"

# show WORKER LOG: of node $node
show() {
  local code=0
  attempt remote_into "$TMP/log" "$node" "$1" "$2" || code=$?
  [ "$DRY" = 1 ] || cat "$TMP/log"
  [ "$code" != 4 ] || die 1 "there is no run on host $1 of $node" "tpu_scripts/run.sh $SAME -- COMMAND"
  [ "$code" = 0 ] || die "$UNREACHABLE" "host $1 of $node does not answer" "the same command again"
}

if [ "$ALL" = 1 ]; then
  for node in $(nodes); do
    show all "$HOST log - $LINES_SHOWN named"
  done
  exit 0
fi
node=$(nodes | sed -n "$((NODE + 1))p")
if [ "$FOLLOW" = 1 ]; then
  LINE=$(attempt remote "$node" "$WORKER" "$HOST status") || die "$UNREACHABLE" "host $WORKER of $node does not answer" "the same command again"
  [ "$DRY" = 0 ] || LINE='jaxtune-host running ID'
  # shellcheck disable=SC2086 # fields
  set -- $LINE
  [ "${2:-none}" != none ] || die 1 "there is no run on $node" "tpu_scripts/run.sh $SAME -- COMMAND"
  remote "$node" "$WORKER" "$HOST follow $3 1" </dev/null
else
  show "$WORKER" "$HOST log - $LINES_SHOWN"
fi
