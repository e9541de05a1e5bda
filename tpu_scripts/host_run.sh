#!/usr/bin/env bash
#
# Runs on a TPU host, for run.sh, logs.sh and watch.sh. A run is a folder ~/jaxtune-runs/ID with its
# command, log and, when it has ended, its exit code. It belongs to no terminal and no connection.
#
# host_run.sh start ID SUM -- COMMAND...   starts COMMAND, unless run ID is here already
# host_run.sh status                       one line: jaxtune-host none
#                                          jaxtune-host running|ended|lost ID SUM CODE new|told
# host_run.sh follow ID BYTE               the log from that byte (1 is the first) to the end of the run
# host_run.sh told ID                      the exit code has been seen
# host_run.sh stop                         SIGTERM to the run: jaxtune saves and ends with 75
# host_run.sh log ID LINES [named]         the last lines of a run, of the newest where ID is -;
#                                          named: the host's name before each

set -euo pipefail
runs=$HOME/jaxtune-runs
verb=$1
shift

newest() { cat "$runs/newest" 2>/dev/null || true; }

# A run holds its lock while anything of it lives, so no number of a process can mislead us.
state() {
  if [ -e "$runs/$1/code" ]; then
    echo ended
  elif flock --nonblock "$runs/$1/lock" true; then
    # It may have ended between the two questions.
    if [ -e "$runs/$1/code" ]; then echo ended; else echo lost; fi
  else
    echo running
  fi
}

start() {
  local id=$1 sum=$2
  shift 3
  mkdir -p "$runs"
  # The folder is the claim: a start that is sent twice starts once.
  if mkdir "$runs/$id" 2>/dev/null; then
    printf '%s\n' "$*" >"$runs/$id/command"
    printf '%s\n' "$sum" >"$runs/$id/sum"
    : >"$runs/$id/log"
    : >"$runs/$id/lock"
    printf '%s\n' "$id" >"$runs/newest"
    # The inner shell outlives a SIGTERM to its group, to write down how the command took it.
    # shellcheck disable=SC2016 # expanded by the inner shell
    (
      cd "$HOME/jaxtune-code"
      PATH="$HOME/jaxtune-env/bin:$PATH" PYTHONUNBUFFERED=1 nohup setsid flock "$runs/$id/lock" \
        bash -c 'trap : TERM INT HUP; folder=$1; shift; echo $$ >"$folder/pid"
          code=0; "$@" || code=$?
          echo "$code" >"$folder/code.new"; mv "$folder/code.new" "$folder/code"' \
        jaxtune-run "$runs/$id" "$@" >"$runs/$id/log" 2>&1 </dev/null &
    )
  fi
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    [ ! -s "$runs/$id/pid" ] || break
    sleep 0.3
  done
  [ -s "$runs/$id/pid" ]
  echo "jaxtune-host started $id"
}

status() {
  local id
  id=$(newest)
  if [ -z "$id" ]; then
    echo "jaxtune-host none"
    return
  fi
  local seen=new code=-
  [ ! -e "$runs/$id/told" ] || seen=told
  [ ! -e "$runs/$id/code" ] || code=$(cat "$runs/$id/code")
  echo "jaxtune-host $(state "$id") $id $(cat "$runs/$id/sum") $code $seen"
}

follow() { tail --bytes="+$2" --follow --sleep-interval=0.5 --pid="$(cat "$runs/$1/pid")" "$runs/$1/log"; }

stop() {
  local id pid
  id=$(newest)
  if [ -n "$id" ] && [ "$(state "$id")" = running ]; then
    pid=$(cat "$runs/$id/pid")
    # The group of the inner shell; flock above it only waits.
    kill -TERM -- "-$(ps -o pgid= -p "$pid" | tr -d ' ')"
  fi
  echo "jaxtune-host stopping"
}

case $verb in
  start) start "$@" ;;
  status) status ;;
  follow) follow "$@" ;;
  told)
    touch "$runs/$1/told"
    echo "jaxtune-host told"
    ;;
  stop) stop ;;
  log)
    id=$1
    set -- "$1" "$2" "${3:-}"
    [ "$id" != - ] || id=$(newest)
    if [ -z "$id" ] || [ ! -e "$runs/$id/log" ]; then
      echo "there is no such run on this host" >&2
      exit 4
    fi
    tail --lines="$2" "$runs/$id/log" | sed "s/^/${3:+$(hostname): }/"
    ;;
esac
