#!/usr/bin/env bash
#
# create.sh NAME --zone=ZONE --accelerator-type=TYPE [options]
#
# Makes a TPU slice. From then on it costs money, until delete.sh.
#
#   --accelerator-type=TYPE   what the cloud console says: v5litepod-8, v5p-64, v6e-16, v4-32, tpu7x-8
#   --spot                    cheaper; Google may take it away at any time (watch.sh makes it anew)
#   --queued                  wait in line for capacity instead of failing (queued resource)
#   --valid-until=DURATION    leave the line after this time, such as 6h (with --queued)
#   --node-count=N            N slices joined by the data centre's network; always queued
#   --runtime-version=V       the image; by default the one for the type
#   --gcloud-flag=FLAG        one more flag for gcloud, such as --gcloud-flag=--network=mine; repeatable
#   --project=ID              by default gcloud's own
#   --dry-run                 print the commands, run nothing
#
# Exit codes: 0 made, or in the queue; 1 refused; 2 wrong usage; 69 gcloud cannot be reached.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

TYPE='' RUNTIME='' SPOT=0 QUEUED=0 UNTIL='' EXTRA=()

# The image Google's page "TPU software versions" gives for JAX; Python and JAX come from setup.sh.
runtime_of() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    tpu7x-*) echo v2-alpha-tpu7-ubuntu2404 ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die 2 "no image is known for $1" "--runtime-version=V, from cloud.google.com/tpu/docs/runtimes" ;;
  esac
}

# check_size TYPE: refuse what no zone has. v5e and v6e count chips, the others cores, two a chip; from
# 64 chips on, v4, v5p and 7x are made of cubes of 4x4x4.
check_size() {
  local sizes cube=0 kind=${1%-*} count=${1##*-} size
  case $kind in
    v5litepod | v6e) sizes='1 4 8 16 32 64 128 256' ;;
    v2) sizes='8 32 128 256 512' ;;
    v3) sizes='8 32 128 256 512 1024 2048' ;;
    v4 | v5p) sizes='8 16 32 64' cube=128 ;;
    tpu7x) sizes='2 8 16 32 64' cube=128 ;;
    *) return 0 ;;
  esac
  for size in $sizes; do [ "$count" != "$size" ] || return 0; done
  if [ "$cube" != 0 ]; then
    [ "${#count}" -gt 5 ] || [ $((count % cube)) != 0 ] || return 0
    sizes="$sizes and multiples of $cube"
  fi
  die 2 "there is no $1; the sizes of $kind are $sizes" \
    "--accelerator-type=$kind-8; gcloud compute tpus accelerator-types list --zone=$ZONE has what is there"
}

read_options() {
  local option
  for option; do
    case $option in
      --accelerator-type=*) TYPE=${option#*=} ;;
      --runtime-version=*) RUNTIME=${option#*=} ;;
      --spot) SPOT=1 ;;
      --queued) QUEUED=1 ;;
      --valid-until=*) UNTIL=${option#*=} ;;
      --gcloud-flag=*) EXTRA+=("${option#*=}") ;;
      *) take_common "$option" ;;
    esac
  done
  check_common
  need '(v[0-9]+[a-z]*|tpu[0-9]+[a-z]*)-[1-9][0-9]*' "$TYPE" "the accelerator type" \
    "--accelerator-type=v5litepod-8; gcloud compute tpus accelerator-types list --zone=$ZONE has all"
  check_size "$TYPE"
  [ -n "$RUNTIME" ] || RUNTIME=$(runtime_of "$TYPE")
  need '[a-z0-9][a-z0-9._-]*' "$RUNTIME" "the runtime version" "cloud.google.com/tpu/docs/runtimes"
  [ "$NODE_COUNT" = 1 ] || QUEUED=1
  if [ -n "$UNTIL" ]; then
    [ "$QUEUED" = 1 ] || die 2 "--valid-until without a queue" "--queued"
    need '([0-9]+[smhd])+' "$UNTIL" "the duration" "--valid-until=6h"
  fi
  for option in ${EXTRA[@]+"${EXTRA[@]}"}; do
    need '--[a-z][a-z-]*(=.*)?' "$option" "the flag for gcloud" "--gcloud-flag=--network=mine"
  done
}

make() {
  local nodes=("--node-id=$NAME") spot=()
  [ "$SPOT" = 0 ] || spot=(--spot)
  if [ "$QUEUED" = 0 ]; then
    attempt gc compute tpus tpu-vm create "$NAME" "${WHERE[@]}" "--accelerator-type=$TYPE" \
      "--version=$RUNTIME" ${spot[@]+"${spot[@]}"} ${EXTRA[@]+"${EXTRA[@]}"}
    return
  fi
  [ "$NODE_COUNT" = 1 ] || nodes=("--node-count=$NODE_COUNT" "--node-prefix=$NAME")
  [ -z "$UNTIL" ] || spot+=("--valid-until-duration=$UNTIL")
  attempt gc compute tpus queued-resources create "$NAME" "${WHERE[@]}" "${nodes[@]}" \
    "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME" \
    ${spot[@]+"${spot[@]}"} ${EXTRA[@]+"${EXTRA[@]}"}
}

explain() {
  if grep -Eiq 'ALREADY_EXISTS|already exists' "$LAST"; then
    # An answer that was lost on its way: the try before this one made it.
    if [ -e "$TMP/retried" ]; then return 0; fi
    costs
    die 1 "$NAME exists already in $ZONE" "another name, or tpu_scripts/setup.sh $SAME"
  elif no_capacity "$LAST"; then
    die 1 "no $TYPE is free in $ZONE now" "--queued to wait in line, --spot, or another zone"
  elif no_quota "$LAST"; then
    die 1 "the project has no quota for $TYPE$([ "$SPOT" = 0 ] || echo ' on spot') in $ZONE" \
      "a zone where it has, or ask for more: console.cloud.google.com/iam-admin/quotas"
  elif grep -Eiq 'PERMISSION_DENIED|does not have .*permission|has not been used|is disabled' "$LAST"; then
    die 1 "gcloud may not make TPUs in this project" \
      "gcloud auth login, gcloud services enable tpu.googleapis.com, and the role TPU Admin"
  fi
  say "$NAME may have been made all the same, and would cost money"
  transient "$LAST" "$1" && set -- "$UNREACHABLE"
  die "$1" "gcloud failed while making $NAME" \
    "gcloud compute tpus tpu-vm describe $NAME $(quote "${WHERE[@]}"), and tpu_scripts/delete.sh $SAME"
}

read_options "$@"
INTERRUPTED="$NAME may be in the making, and would cost money"
trap interrupted INT TERM HUP
[ "$DRY" = 1 ] || say "making $NAME ($TYPE, $RUNTIME) in $ZONE; this can take minutes"
make || explain $?
[ "$DRY" = 0 ] || exit 0
if [ "$QUEUED" = 1 ]; then
  say "$NAME is in the queue; look: gcloud compute tpus queued-resources describe $NAME $(quote "${WHERE[@]}")"
  say "it costs nothing while it waits, and money from the moment it is ACTIVE, whether you look or not"
else
  say "$NAME is ready for tpu_scripts/setup.sh $SAME"
fi
costs
