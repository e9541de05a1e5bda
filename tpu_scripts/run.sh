#!/usr/bin/env bash
#
# run.sh NAME --zone=ZONE [options] -- COMMAND...
# run.sh NAME --zone=ZONE --stop
#
# Starts the same command on every host, in ~/jaxtune-code with jaxtune on the PATH, and shows what host 0
# prints. The run does not need this terminal: close it, and the run goes on. The same line again attaches
# to it, or tells how it ended meanwhile. Comes back with the exit code of the command.
#
#   --stop             end the run that is going on: jaxtune saves and can be started again
#   --node-count=N     as it was made
#   --project=ID       by default gcloud's own
#   --dry-run          print the commands, run nothing
#
# Exit codes: those of COMMAND (jaxtune: 0 done, 75 safe to start again); 2 wrong usage, or another command
# is running; 69 the hosts cannot be reached, and the run may go on there.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

STOP=0
while [ $# -gt 0 ]; do
  case $1 in
    --stop) STOP=1 ;;
    --) break ;;
    *) take_common "$1" ;;
  esac
  shift
done
check_common
if [ "$STOP" = 1 ]; then
  [ $# = 0 ] || die 2 "--stop with a command" "one of the two"
else
  [ $# -gt 1 ] || die 2 "there is no command" "tpu_scripts/run.sh $SAME -- jaxtune train ..."
  shift
  case $1 in -* | '') die 2 "the command begins with $(quote "$1")" "-- jaxtune train ..." ;; esac
fi
COMMAND=$(quote "$@")
SUM=$(printf '%s' "$COMMAND" | cksum | cut -d ' ' -f 1)

status() {
  if ! everywhere "$HOST status"; then
    if grep -Eq 'No such file|exit status 127' "$LAST"; then
      die 2 "jaxtune is not installed on $NAME" "tpu_scripts/setup.sh $SAME"
    fi
    costs
    die "$UNREACHABLE" "only $(answered) of $NAME answer" "the same command again; a run that was going on goes on"
  fi
}

# ID of the run to attach to, from what the hosts say; a new one where there is none.
choose() {
  local other
  NEW=0
  other=$(awk -v sum="$SUM" '$2 == "running" && $4 != sum {print $3; exit}' "$TMP/hosts")
  [ -z "$other" ] || die 2 "another command is running on $NAME ($other)" \
    "that command again to attach, tpu_scripts/logs.sh $SAME to look, or tpu_scripts/run.sh $SAME --stop to end it"
  ID=$(awk -v sum="$SUM" '$2 == "running" || ($2 != "none" && $4 == sum && $6 == "new") {print ($2 != "running"), $3}' \
    "$TMP/hosts" | sort | awk 'NR == 1 {print $2}')
  if [ -z "$ID" ]; then
    NEW=1
    ID=$(date -u +%Y%m%d-%H%M%S)-$$
  elif awk -v id="$ID" '$2 == "running" {some = 1} $3 != id {lacks = 1} END {exit !(some && lacks)}' "$TMP/hosts"; then
    NEW=1 # a start that did not reach every host
  fi
}

start() {
  say "starting on every host of $NAME: $COMMAND"
  if ! everywhere "$HOST start $ID $SUM -- $COMMAND"; then
    costs
    die "$UNREACHABLE" "the run started on $(answered) only" \
      "the same command again, which starts the others; or tpu_scripts/run.sh $SAME --stop"
  fi
}

# The log of host 0 to its end, over as many connections as it takes; not a byte twice.
follow() {
  local node code before failures=0
  node=$(first_node)
  : >"$TMP/log"
  while :; do
    before=$(wc -c <"$TMP/log")
    code=0
    remote "$node" 0 "$HOST follow $ID $((before + 1))" 2>"$LAST" </dev/null | tee -a "$TMP/log" || code=$?
    [ "$code" != 0 ] || return 0
    [ "$(wc -c <"$TMP/log")" -eq "$before" ] || failures=0
    failures=$((failures + 1))
    describe "$node"
    [ "$STATE" = READY ] && [ "$failures" -lt 20 ] || {
      tail -n 1 "$LAST" >&4
      die "$UNREACHABLE" "$node is $STATE and its log cannot be read" \
        "the same command again to attach; tpu_scripts/watch.sh makes preempted slices anew"
    }
    say "lost the connection; the run goes on. Connecting again in $((failures * 5)) s"
    sleep $((failures * 5))
  done
}

# Until no host runs it any more. Those that are left behind after two minutes are stopped.
settle() {
  local polls=0
  while :; do
    status
    grep -q ' running ' "$TMP/hosts" || return 0
    polls=$((polls + 1))
    if [ "$polls" = 24 ]; then
      say "host 0 has ended two minutes ago and others have not: stopping them"
      everywhere "$HOST stop" || true
    elif [ "$polls" = 60 ]; then
      costs
      die "$UNREACHABLE" "some hosts do not stop" "tpu_scripts/delete.sh $SAME, or log in with gcloud"
    fi
    sleep 5
  done
}

# One code for all hosts: the cause before its consequences. A host that failed by itself says why; 75
# (safe to start again) and hosts that vanished follow from another host's end; 0 is everybody's.
verdict() {
  awk -v id="$ID" '$3 != id {next}
       {code = ($2 == "lost") ? 75 : $5
        rank = (code == 0) ? 0 : (code > 128 && code != 130) ? 1 : (code == 75) ? 2 : 3
        if (rank > best) {best = rank; final = code}}
       END {print final + 0}' "$TMP/hosts"
}

meaning() {
  case $1 in
    0) echo "done" ;;
    2) echo "wrong usage or config" ;;
    65) echo "bad data or model" ;;
    74) echo "storage failed" ;;
    75) echo "interrupted; the same command goes on from the last checkpoint" ;;
    76) echo "numbers went bad" ;;
    130) echo "cancelled" ;;
    *) echo "failed; its last lines are above, other hosts': tpu_scripts/logs.sh $SAME --all" ;;
  esac
}

need_ready
if [ "$DRY" = 1 ]; then
  ID=ID
  if [ "$STOP" = 1 ]; then
    everywhere "$HOST stop"
  else
    everywhere "$HOST status"
    everywhere "$HOST start $ID $SUM -- $COMMAND"
    remote "$(first_node)" 0 "$HOST follow $ID 1"
    everywhere "$HOST status"
    everywhere "$HOST told $ID"
  fi
  exit 0
fi
if [ "$STOP" = 1 ]; then
  everywhere "$HOST stop" || die "$UNREACHABLE" "only $(answered) heard it" "the same command again"
  settle
  say "nothing runs on $NAME any more"
  costs
  exit 0
fi

status
choose
INTERRUPTED="the run goes on. Attach with the same command; end it with tpu_scripts/run.sh $SAME --stop"
trap interrupted INT TERM HUP
if [ "$NEW" = 1 ]; then start; else say "attaching to the run of $ID"; fi
follow
settle
code=$(verdict)
everywhere "$HOST told $ID" || true
say "the run ended with $code ($(meaning "$code"))"
costs
exit "$code"
