#!/usr/bin/env bash
#
# watch.sh NAME --zone=ZONE --accelerator-type=TYPE [options] -- COMMAND...
#
# Sees a command through on a slice that may vanish: waits in line for it, sets it up, runs COMMAND, and
# when Google takes the slice away makes it anew and starts COMMAND again, which goes on from its last
# checkpoint. Keep checkpoints on gs://: the disks of a preempted slice are gone. Leave it running on a
# machine that stays awake; the same line again takes over where it was.
#
#   --spot, --runtime-version=V, --gcloud-flag=FLAG   as for create.sh; what is made anew is made so
#   --with=PATH, --hf-token                           as for setup.sh
#   --delete-after     delete the slice when the run is over, however it ended (needs gs:// in COMMAND)
#   --max-restarts=N   starts after an exit code of 75 without a preemption, by default 10
#   --node-count=N     that many slices
#   --project=ID       by default gcloud's own
#   --dry-run          print the commands, run nothing
#
# Exit codes: 0 COMMAND is done; 75 restarted too often; 2, 65, 70, 74, 76, 130 and others: COMMAND's own,
# at which starting again would not help.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

CREATE=(--queued) SETUP=() TYPE='' AFTER=0 RESTARTS=10
while [ $# -gt 0 ]; do
  case $1 in
    --accelerator-type=*)
      TYPE=${1#*=}
      CREATE+=("$1")
      ;;
    --spot | --runtime-version=* | --gcloud-flag=*) CREATE+=("$1") ;;
    --with=* | --hf-token) SETUP+=("$1") ;;
    --delete-after) AFTER=1 ;;
    --max-restarts=*) RESTARTS=${1#*=} ;;
    --) break ;;
    *) take_common "$1" ;;
  esac
  shift
done
check_common
[ -n "$TYPE" ] || die 2 "there is no --accelerator-type" "--accelerator-type=v5p-64, to make the slice anew"
need '[0-9]{1,6}' "$RESTARTS" "the number of restarts" "--max-restarts=10"
[ $# -gt 1 ] || die 2 "there is no command" "tpu_scripts/watch.sh $SAME --accelerator-type=$TYPE -- jaxtune train ..."
shift
case " $*" in
  *=gs://* | *' gs://'*) ;;
  *)
    [ "$AFTER" = 0 ] || die 2 "--delete-after would delete the results with the disks" "--workdir=gs://BUCKET/FOLDER"
    say "the command names no gs:// folder: after a preemption it begins again from nothing"
    ;;
esac

SLICE=("$NAME" "--zone=$ZONE")
[ -z "$PROJECT" ] || SLICE+=("--project=$PROJECT")
[ "$NODE_COUNT" = 1 ] || SLICE+=("--node-count=$NODE_COUNT")

verb() {
  local script=$1
  shift
  if [ "$DRY" = 1 ]; then set -- "$@" --dry-run; fi
  "$here/$script" "${SLICE[@]}" "$@"
}

# SLICE_STATE: ABSENT, WAITING, READY, LEAVING, STOPPED (by somebody) or GONE (preempted or failed: what
# is left is to be deleted and all of it made anew).
look_at_slice() {
  local node absent=0 gone=0 stopped=0 waiting=0
  describe_queue
  case $QUEUE in
    ABSENT | ACTIVE) ;;
    SUSPENDED | FAILED) SLICE_STATE=GONE && return ;;
    SUSPENDING | DELETING) SLICE_STATE=LEAVING && return ;;
    *) SLICE_STATE=WAITING && return ;;
  esac
  for node in $(nodes); do
    describe "$node"
    case $STATE in
      READY) ;;
      ABSENT) absent=$((absent + 1)) ;;
      PREEMPTED | TERMINATED) gone=1 ;;
      STOPPED | HIDDEN) stopped=1 ;;
      *) waiting=1 ;;
    esac
  done
  if [ "$QUEUE" = ABSENT ] && [ "$absent" = "$NODE_COUNT" ]; then
    SLICE_STATE=ABSENT
  elif [ "$stopped" = 1 ]; then
    SLICE_STATE=STOPPED
  elif [ "$gone" = 1 ] || [ "$absent" -gt 0 ]; then
    SLICE_STATE=GONE
  elif [ "$waiting" = 1 ]; then
    SLICE_STATE=WAITING
  else
    SLICE_STATE=READY
  fi
}

# The same, however long gcloud cannot be reached.
see_slice() {
  local seen
  until seen=$(look_at_slice && echo "$SLICE_STATE ${QUEUE:-?}"); do
    say "gcloud cannot be reached, so nobody knows how $NAME is; looking again in a minute"
    costs
    sleep 60
  done
  SLICE_STATE=${seen% *} QUEUE=${seen#* }
}

# Until every host is READY; makes what is not there.
await_slice() {
  local told='' refused=0 code
  while :; do
    see_slice
    if [ "$told" != "$SLICE_STATE $QUEUE" ]; then
      say "$(date -u +%H:%M:%S) UTC: $NAME is $SLICE_STATE (queue: $QUEUE)"
      told="$SLICE_STATE $QUEUE"
    fi
    case $SLICE_STATE in
      READY) return 0 ;;
      GONE)
        [ "$QUEUE" != FAILED ] || refused=$((refused + 1))
        # A queued request without quota or with a wrong type is accepted first and fails later.
        [ "$refused" -lt 3 ] || finish 1 "the queue refused $NAME three times; why: gcloud compute tpus queued-resources describe $NAME $(quote "${WHERE[@]}")"
        say "deleting what is left of $NAME to make it anew"
        verb delete.sh --yes || sleep 60
        ;;
      STOPPED) finish 1 "somebody stopped $NAME, so it is not touched; start it with gcloud, or tpu_scripts/delete.sh $SAME" ;;
      ABSENT)
        code=0
        verb create.sh "${CREATE[@]}" || code=$?
        case $code in
          0) ;;
          "$UNREACHABLE") sleep 60 ;;
          *) finish "$code" "the slice could not be made" ;;
        esac
        ;;
      *) sleep 60 ;;
    esac
  done
}

# finish CODE WHY: the end of the watch, with or without a slice that costs money.
finish() {
  trap - INT TERM HUP
  say "$2"
  see_slice
  if [ "$AFTER" = 1 ] && [ "$SLICE_STATE" != ABSENT ] && [ "$SLICE_STATE" != STOPPED ]; then
    verb delete.sh --yes || say "NOT deleted"
    see_slice
  fi
  [ "$SLICE_STATE" = ABSENT ] || costs
  exit "$1"
}

if [ "$DRY" = 1 ]; then
  describe_queue
  verb create.sh "${CREATE[@]}"
  verb setup.sh ${SETUP[@]+"${SETUP[@]}"}
  "$here/run.sh" "${SLICE[@]}" --dry-run -- "$@"
  echo "# preempted: this, and from the top again"
  verb delete.sh --yes
  exit 0
fi

INTERRUPTED="a run that is going on goes on, but nobody makes a preempted slice anew; watch again with the same command"
trap interrupted INT TERM HUP
restarts=0 failures=0
while :; do
  await_slice
  code=0 phase=setup
  verb setup.sh ${SETUP[@]+"${SETUP[@]}"} || code=$?
  [ "$code" != 2 ] || finish 2 "setup refuses"
  if [ "$code" = 0 ]; then
    phase=run
    "$here/run.sh" "${SLICE[@]}" -- "$@" || code=$?
    [ "$code" != 0 ] || finish 0 "the run is done"
  fi

  see_slice
  case $SLICE_STATE-$phase-$code in
    READY-run-75)
      failures=0 restarts=$((restarts + 1))
      [ "$restarts" -le "$RESTARTS" ] || finish 75 "the run was interrupted $restarts times on a slice that stayed"
      say "interrupted; starting the same command again ($restarts of $RESTARTS)"
      ;;
    READY-setup-* | "READY-run-$UNREACHABLE")
      failures=$((failures + 1))
      [ "$failures" -le 5 ] || finish "$code" "the hosts could not be used ($phase: $code), six times in a row"
      say "trying again in a minute ($failures of 5)"
      sleep 60
      ;;
    READY-*) finish "$code" "the run ended with $code, and starting again would not help" ;;
    *)
      failures=0 restarts=0
      case $phase-$code in
        run-75 | "run-$UNREACHABLE" | setup-*) say "$NAME is not READY any more; starting over" ;;
        # It had ended by itself before the slice went.
        *) finish "$code" "the run ended with $code, and starting again would not help" ;;
      esac
      ;;
  esac
done
