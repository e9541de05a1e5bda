# shellcheck shell=bash
# What the verbs beside this file share; sourced, never run. Bash 3.2 is enough (macOS).
#
# ZONE, PROJECT, NAME, NODE_COUNT   which slices; several slices are nodes NAME-0, NAME-1, ...
# DRY                               1: gcloud commands are printed on descriptor 3, none is run
# TMP                               a folder of this process, gone when it ends

UNREACHABLE=69 # gcloud or the hosts cannot be reached; what was running goes on
# shellcheck disable=SC2034 # for the verbs
HOST="bash jaxtune-code/tpu_scripts/host_run.sh"
NAME='' ZONE='' PROJECT='' NODE_COUNT=1 DRY=0
VERB=$(basename "$0")
PREFIX="${VERB%.sh}"
TMP=$(mktemp -d "${TMPDIR:-/tmp}/jaxtune.XXXXXX")
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$TMP"' EXIT
exec 3>&1 4>&2

say() { printf '%s: %s\n' "$PREFIX" "$*" >&4; }

# die CODE WHAT FIX: one line, as jaxtune's own failures read.
die() {
  printf '%s\n' "$(printf '%s: error: %s; try: %s' "$PREFIX" "$2" "$3" | tr '\n' ' ')" >&4
  exit "$1"
}

# The words of a command line, quoted for any POSIX shell and for the eye.
quote() {
  local word out=''
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    out="$out${out:+ }$word"
  done
  printf '%s' "$out"
}

# The comment at the top of a verb is its help.
usage() { sed -n '3,/^$/s/^# \{0,1\}//p' "$0"; }

# The options of every verb, and the name.
take_common() {
  case $1 in
    --zone=*) ZONE=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --node-count=*) NODE_COUNT=${1#*=} ;;
    --dry-run) DRY=1 ;;
    -h | --help)
      usage
      exit 0
      ;;
    --*[!a-z-]*) die 2 "unknown option $(quote "$1")" "tpu_scripts/$VERB --help" ;;
    --?*)
      # As gcloud also takes it: --zone ZONE.
      if usage | grep -q -e "$1="; then die 2 "$1 has no value" "$1=VALUE"; fi
      die 2 "unknown option $1" "tpu_scripts/$VERB --help"
      ;;
    -*) die 2 "unknown option $(quote "$1")" "tpu_scripts/$VERB --help" ;;
    *)
      [ -z "$NAME" ] || die 2 "two names, $(quote "$NAME") and $(quote "$1")" "tpu_scripts/$VERB --help"
      NAME=$1
      ;;
  esac
}

# need PATTERN VALUE WHAT FIX: refuse a value before anything runs.
need() {
  printf '%s' "$2" | LC_ALL=C grep -Eqx -e "$1" && [ "$(printf '%s' "$2" | wc -l)" -eq 0 ] ||
    die 2 "$3 is $(quote "$2")" "$4"
}

check_common() {
  need '[a-z]([-a-z0-9]{0,60}[a-z0-9])?' "$NAME" "the name" \
    "a name of small letters, digits and dashes that starts with a letter"
  need '[a-z]+-[a-z]+[0-9]+-[a-z][a-z0-9]*' "$ZONE" "the zone" "--zone=us-west4-a, or where your quota is"
  [ -z "$PROJECT" ] || need '[a-z][a-z0-9.:-]*[a-z0-9]' "$PROJECT" "the project" "--project=PROJECT_ID"
  need '[1-9][0-9]{0,2}' "$NODE_COUNT" "the number of slices" "--node-count=2"
  WHERE=("--zone=$ZONE")
  SAME="$NAME --zone=$ZONE" # what the other verbs are to be given, for messages
  if [ -n "$PROJECT" ]; then
    WHERE+=("--project=$PROJECT")
    SAME="$SAME --project=$PROJECT"
  fi
  [ "$NODE_COUNT" = 1 ] || SAME="$SAME --node-count=$NODE_COUNT"
  WHERE+=(--quiet) # a question of gcloud's would wait for ever behind our log
  [ "$DRY" = 1 ] || command -v gcloud >/dev/null ||
    die 2 "there is no gcloud on this machine" "the installer at cloud.google.com/sdk/docs/install"
}

check_gs() {
  need 'gs://[a-z0-9][a-z0-9._-]+(/[^*?]*)?' "$1" "the bucket path" "gs://BUCKET/FOLDER, without * ? or ["
  case $1 in *'['*) die 2 "the bucket path is $(quote "$1")" "gs://BUCKET/FOLDER, without * ? or [" ;; esac
}

nodes() {
  local i=0
  if [ "$NODE_COUNT" = 1 ]; then
    echo "$NAME"
    return
  fi
  while [ "$i" -lt "$NODE_COUNT" ]; do
    echo "$NAME-$i"
    i=$((i + 1))
  done
}

first_node() { nodes | head -n 1; }

# For `trap`: says what goes on without this terminal, and what it costs. INTERRUPTED is the verb's.
interrupted() {
  trap '' INT TERM HUP
  say "interrupted: $INTERRUPTED"
  costs
  exit 130
}

costs() { say "$NAME costs money until: tpu_scripts/delete.sh $SAME"; }

gc() {
  if [ "$DRY" = 1 ]; then
    printf '%s\n' "gcloud $(quote "$@")" >&3
  else
    gcloud "$@"
  fi
}

# gcloud also warns of a "quota project", which is nothing of the kind.
no_quota() {
  ! grep -Eiq 'per minute|RATE_LIMIT_EXCEEDED' "$1" &&
    grep -Eiq 'quota[^.]*exceeded|exceed[^.]*quota|insufficient[^.]*quota|QUOTA_EXCEEDED' "$1"
}

no_capacity() { grep -Eiq 'no more capacity|insufficient[^.]*capacity' "$1"; }

# Whether the failure in file $1 (exit code $2) may pass by itself. A request rate does, a quota,
# a permission or a lack of chips does not.
transient() {
  grep -Eiq 'per minute|RATE_LIMIT_EXCEEDED' "$1" && return 0
  if no_quota "$1" || no_capacity "$1"; then return 1; fi
  grep -Eiq 'PERMISSION_DENIED|does not have .*permission|NOT_FOUND|ALREADY_EXISTS|already exists' "$1" && return 1
  grep -Eiq 'INVALID_ARGUMENT|FAILED_PRECONDITION|UNAUTHENTICATED|invalid_grant' "$1" && return 1
  [ "$2" = 255 ] && return 0
  grep -Eiq '(^|[^0-9a-z])(429|500|502|503|504)([^0-9a-z]|$)|too many requests|unavailable|backendError|internal error|connection (refused|reset|closed|timed out)|timed out|could not (ssh|resolve)|connect to host|broken pipe|network is unreachable|\[255\]|exit status 255|kex_exchange' "$1"
}

# attempt COMMAND...: again and again, with longer pauses, while the failure may pass by itself.
# What it says on stderr is shown when it is over, and stays in $LAST.
LAST=$TMP/last
attempt() {
  local tries=1 pause=5 code errors
  errors=$(mktemp "$TMP/errors.XXXXXX")
  while :; do
    code=0
    "$@" 2>"$errors" </dev/null || code=$?
    cp "$errors" "$LAST"
    if [ "$code" = 0 ]; then
      cat "$errors" >&2
      return 0
    fi
    if [ "$tries" -ge 6 ] || ! transient "$errors" "$code"; then
      cat "$errors" >&2
      return "$code"
    fi
    say "$(grep -v '^[[:space:]]*$' "$errors" | tail -n 1 | cut -c 1-200) (code $code): again in $pause s"
    : >"$TMP/retried"
    sleep "$pause"
    tries=$((tries + 1)) pause=$((pause * 2))
  done
}

# look COMMAND...: attempt, saying nothing where the thing is not there; code 44 then.
look() {
  local code=0
  attempt "$@" 2>"$TMP/looked" || code=$?
  [ "$code" != 0 ] || return 0
  if grep -Eiq 'NOT_FOUND|was not found' "$TMP/looked"; then return 44; fi
  cat "$TMP/looked" >&2
  return "$UNREACHABLE"
}

# STATE and WORKERS of the node $1; STATE is ABSENT where there is none.
describe() {
  local line code=0
  line=$(look gc compute tpus tpu-vm describe "$1" "${WHERE[@]}" \
    '--format=value(state,networkEndpoints[].ipAddress)') || code=$?
  STATE=ABSENT WORKERS=0
  [ "$code" != 44 ] || return 0
  [ "$code" = 0 ] || die "$UNREACHABLE" "gcloud cannot say whether $1 exists" \
    "gcloud auth list, the zone and the project, then the same command again; $1 may cost money"
  if [ "$DRY" = 1 ]; then
    STATE=READY WORKERS=1
    return
  fi
  # shellcheck disable=SC2086 # fields are cut at the tab and the addresses at their semicolons
  set -- ${line//[;,]/ }
  STATE=${1:-ABSENT} WORKERS=$(($# > 0 ? $# - 1 : 0))
}

# QUEUE: the state of the queued resource, or ABSENT.
# shellcheck disable=SC2034 # for the verbs
describe_queue() {
  local code=0
  QUEUE=$(look gc compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
    '--format=value(state.state)') || code=$?
  if [ "$code" = 44 ]; then
    QUEUE=ABSENT
  elif [ "$code" != 0 ]; then
    die "$UNREACHABLE" "gcloud cannot say whether $NAME is in the queue" \
      "gcloud auth list, then the same command again; $NAME may cost money"
  fi
}

# What there is in the zone, for a message about a name that is not there; empty where nobody says.
others() {
  local found
  found=$(gcloud compute tpus tpu-vm list "${WHERE[@]}" '--format=value(name)' 2>/dev/null </dev/null) || return 0
  [ -z "$found" ] || printf ' (there is %s)' "$(printf '%s' "$found" | head -n 8 | tr '\n' ' ' | sed 's/ *$//; s/ /, /g')"
}

# need_node NODE: it is READY, or one line says what is amiss with it.
need_node() {
  describe "$1"
  [ "$STATE" != ABSENT ] || die 2 "there is no $1 in $ZONE$(others)" \
    "gcloud compute tpus tpu-vm list --zone=-, and --node-count where it has several slices"
  case $STATE in
    READY) ;;
    PREEMPTED | TERMINATED) die "$UNREACHABLE" "$1 is $STATE, not READY: its hosts are gone, and their disks with them" \
      "what is on gs:// is still there; tpu_scripts/watch.sh makes the slice anew, tpu_scripts/delete.sh $SAME removes it" ;;
    *) die "$UNREACHABLE" "$1 is $STATE, not READY" \
      "the same command when it is READY; tpu_scripts/watch.sh waits and makes preempted slices anew" ;;
  esac
  [ "$WORKERS" != 0 ] || die "$UNREACHABLE" "$1 is READY without an address" "the same command again"
  echo "$WORKERS" >"$TMP/workers.$1"
}

need_ready() {
  local node
  for node in $(nodes); do need_node "$node"; done
}

# remote NODE WORKER COMMAND: in the home folder of one host, or of all of a node.
remote() {
  gc compute tpus tpu-vm ssh "$1" "${WHERE[@]}" "--worker=$2" \
    --ssh-flag=-oServerAliveInterval=15 "--command=$3"
}

# A try that fails half-way and is repeated must not leave its half of the output.
remote_into() {
  local file=$1
  shift
  remote "$@" >"$file"
}

# everywhere COMMAND: run it on all hosts of all slices at once. Lines "jaxtune-host ..." of each are
# kept in $TMP/hosts, their node in front. Fails when a host did not answer with one: the exit code
# of gcloud says little about which of many hosts failed.
everywhere() {
  local node failed=0
  : >"$TMP/hosts"
  for node in $(nodes); do
    if [ "$DRY" = 1 ]; then
      remote "$node" all "$1"
    else
      LAST=$TMP/last.$node attempt remote_into "$TMP/out.$node" "$node" all "$1" &
    fi
  done
  [ "$DRY" = 0 ] || return 0
  wait
  : >"$LAST"
  for node in $(nodes); do
    cat "$TMP/last.$node" >>"$LAST"
    grep -v '^jaxtune-host ' "$TMP/out.$node" >&2 || true
    grep '^jaxtune-host ' "$TMP/out.$node" | sed "s/^jaxtune-host/$node/" >>"$TMP/hosts" || true
    [ "$(grep -c "^$node " "$TMP/hosts" || true)" = "$(cat "$TMP/workers.$node")" ] || failed=1
  done
  return "$failed"
}

# How many of how many hosts answered, for messages.
answered() {
  local node all=0
  for node in $(nodes); do all=$((all + $(cat "$TMP/workers.$node"))); done
  echo "$(wc -l <"$TMP/hosts" | tr -d ' ') of $all hosts"
}
