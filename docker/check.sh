#!/usr/bin/env bash
# Build the images and try what is promised of them, without a Docker daemon and without a registry of images.
#
#   docker/check.sh               read docker/Dockerfile, build its targets on a base made here, try them (make image-check)
#   docker/check.sh FILE          another Dockerfile with the same targets
#   docker/check.sh --try         only try the images that the last run built
#   docker/check.sh --read FILE   only read it: every target must end as a user that is a number and not 0
#
# Needs Linux, root, apt (Debian, Ubuntu), 40 GB of disk and about 4 GB of downloads. buildah (chroot isolation), podman and runc are installed where they are missing.
# Exit code 0: all held; 1: something did not; 2: it cannot be tried here.
#
#   IMAGE_CHECK_ROOT   where storage, base and logs go (/tmp/limbeck-images); what is there is used again
#   BASE_IMAGE, SERVE_BASE_IMAGE   other bases than the one made here, where they can be had
#   TORCH, CUDA        the torch line to build (2.14.1 and 13.0)
#   IMAGE_CHECK_FULL   1: `make test test-long` inside the ci image too, instead of a few tests (an hour more)
# shellcheck disable=SC2015,SC2016  # good and bad do not fail; what is in single quotes is for the shell inside
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=${IMAGE_CHECK_ROOT:-/tmp/limbeck-images}
torch=${TORCH:-2.14.1}
cuda=${CUDA:-13.0}
targets=(serve runtime jupyter ci)
base=localhost/limbeck-test-base
held=0
failed=0

say() { printf '%s\n' "$*"; }
good() { held=$((held + 1)); say "ok    $*"; }
bad() { failed=$((failed + 1)); say "FAIL  $*"; }

# The last USER on the way of each target: `FROM x AS y` begins with that of x.
read_users() {
    awk '
        { sub(/\r$/, "") }
        toupper($1) == "FROM" { i = 2; while ($i ~ /^--/) i++; from = $i; stage = ""
            for (; i < NF; i++) if (toupper($i) == "AS") stage = $(i + 1)
            if (stage == "") stage = "(stage " ++unnamed ")"
            user[stage] = from in user ? user[from] : ""; last = stage }
        toupper($1) == "USER" { user[stage] = $2 }
        END { if (last == "") print "(no stage)||1"; else for (s in user) print s "|" user[s] "|" (s == last) }' "$1"
}

read_file() {
    local file=$1 stage user is_last wrong=0
    [[ -f $file ]] || { say "There is no file $file." >&2; exit 2; }
    while IFS='|' read -r stage user is_last; do
        if [[ " ${targets[*]} " != *" $stage "* && $is_last != 1 ]]; then continue; fi
        if [[ -z $user ]]; then
            bad "$file: target $stage has no USER, so it runs as root. End it with USER 1000:1000."; wrong=1
        elif [[ ! $user =~ ^[0-9]+(:[0-9]+)?$ ]]; then
            bad "$file: target $stage ends with USER $user; Kubernetes' runAsNonRoot needs a number. End it with USER 1000:1000."; wrong=1
        elif [[ $user =~ ^0+(:|$) ]]; then
            bad "$file: target $stage ends as root (USER $user). End it with USER 1000:1000."; wrong=1
        else
            good "$file: target $stage ends as user $user"
        fi
    done < <(read_users "$file")
    return $wrong
}

file=$here/docker/Dockerfile
if [[ ${1:-} == --read ]]; then
    read_file "${2:-$file}" || exit 1
    exit 0
fi
just_try=
if [[ ${1:-} == --try ]]; then just_try=1; shift; fi
[[ $# -le 1 ]] || { say "docker/check.sh takes one file." >&2; exit 2; }
file=${1:-$file}
read_file "$file" || exit 1

[[ $(uname -s) == Linux && $(id -u) == 0 ]] || { say "Building and running needs Linux and root." >&2; exit 2; }
for program in buildah podman runc mmdebstrap curl; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [[ -n ${missing[*]:-} ]]; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

mkdir -p "$root/logs" "$root/volumes"
chmod 755 "$root"
storage=(--root "$root/storage" --runroot "$root/run" --storage-driver overlay)
limits=(--ulimit nofile=20000:20000 --ulimit nproc=30000:30000)
build() { TMPDIR=$root buildah "${storage[@]}" "$@"; }
# Events go nowhere and there is no network of its own: neither needs systemd, iptables or a daemon here.
pod() { podman "${storage[@]}" --runtime runc --cgroup-manager cgroupfs --events-backend none "$@"; }
started() { pod run --rm --network host "${limits[@]}" "$@"; }

# -- a base of this machine's own distribution -------------------------------------------------------------------------------------------------
# What this machine needs to reach its package index (certificates, pip's configuration) goes into the base for this test alone.
if [[ -z $just_try ]] && ! build images --quiet "$base" >/dev/null 2>&1; then
    for sources in /etc/apt/sources.list.d/{debian,ubuntu}.sources /etc/apt/sources.list; do
        [[ -s $sources ]] && break
    done
    # shellcheck source=/dev/null
    suite=$(source /etc/os-release && echo "$VERSION_CODENAME")
    hooks=()
    [[ -f /etc/pip.conf ]] && hooks+=(--customize-hook='copy-in /etc/pip.conf /etc')
    if compgen -G '/usr/local/share/ca-certificates/*.crt' >/dev/null; then
        hooks+=(--customize-hook='copy-in /usr/local/share/ca-certificates /usr/local/share' --customize-hook='chroot "$1" update-ca-certificates')
    fi
    [[ -f $root/base.tar ]] || mmdebstrap --quiet --mode=root --variant=minbase --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --include=ca-certificates,python3,python3-venv,tini,make "${hooks[@]}" "$suite" "$root/base.tar" "$sources"
    container=$(build from scratch)
    build add --quiet "$container" "$root/base.tar" / >/dev/null
    build commit --quiet --rm "$container" "$base" >/dev/null
fi

# -- the targets -------------------------------------------------------------------------------------------------------------------------------
declare -A seconds size
for target in "${targets[@]}"; do
    begun=$(date +%s)
    if [[ -n $just_try ]]; then
        seconds[$target]=- size[$target]=$(pod image inspect --format '{{.Size}}' "limbeck-check:$target" 2>/dev/null || echo 0)
        ((size[$target] > 0)) || bad "target $target was not built before"
    elif build build --isolation chroot --format docker --layers --file "$file" --target "$target" --tag "limbeck-check:$target" "${limits[@]}" \
        --build-arg "BASE_IMAGE=${BASE_IMAGE:-$base}" --build-arg "SERVE_BASE_IMAGE=${SERVE_BASE_IMAGE:-$base}" --build-arg "TORCH=$torch" --build-arg "CUDA=$cuda" \
        "$here" >"$root/logs/build-$target.log" 2>&1; then
        seconds[$target]=$(($(date +%s) - begun))
        size[$target]=$(pod image inspect --format '{{.Size}}' "limbeck-check:$target")
        good "target $target is built: ${seconds[$target]} s, $((size[$target] / 1000000)) MB"
    else
        bad "target $target does not build: $(tail -n 3 "$root/logs/build-$target.log" | tr '\n' ' ')"
    fi
done
[[ $failed == 0 || -n $just_try ]] || { say "$failed failed."; exit 1; }

# -- what it is --------------------------------------------------------------------------------------------------------------------------------
look() { pod image inspect --format "$2" "limbeck-check:$1"; }
for target in "${targets[@]}"; do
    ((size[$target] > 0)) || continue
    [[ $(look "$target" '{{.Config.User}}') =~ ^[1-9][0-9]*(:[0-9]+)?$ ]] && good "$target: the user is a number" || bad "$target: the user is '$(look "$target" '{{.Config.User}}')'"
    [[ $(look "$target" '{{json .Config.Entrypoint}}') == '["tini"'* ]] && good "$target: tini is process 1" || bad "$target: the entrypoint is $(look "$target" '{{json .Config.Entrypoint}}')"
    [[ $(look "$target" '{{json .Config.Env}}') =~ TOKEN|SECRET|PASSWORD ]] && bad "$target: a secret in the environment" || good "$target: no secret in the environment"
    [[ -n $(look "$target" '{{index .Labels "org.opencontainers.image.licenses"}}') ]] && good "$target: labelled" || bad "$target: no OCI labels"
    health=$(look "$target" '{{json .HealthCheck}}')
    if [[ $target == serve ]]; then [[ $health == *health/ready* ]] && good "serve: has a health check" || bad "serve: no health check"
    else [[ $health == null || $health == '{}' ]] && good "$target: no health check" || bad "$target: a health check, which a training does not answer"; fi
done
((size[serve] < 400000000)) && good "serve is under 400 MB" || bad "serve has $((size[serve] / 1000000)) MB"

# -- what it does ------------------------------------------------------------------------------------------------------------------------------
work=$(mktemp -d "$root/volumes/XXXXXX")
trap 'rm -rf "$work"' EXIT
folder() { # folder NAME UID
    mkdir -p "$work/$1"/{code,data,checkpoints,cache}
    cat >"$work/$1/code/nets.py" <<'PYTHON'
from torch import nn


def big(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes))


def small(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
PYTHON
    cp "$here/kd_train.py" "$work/$1/code/"
    chown -R "$2:$2" "$work/$1"
    chmod 755 "$work"
}
volumes() { for v in code data checkpoints cache; do printf -- '--volume\n%s\n' "$work/$1/$v:/workspace/$v"; done; }
expect() { # expect CODE TEXT COMMAND...
    local code=0 wanted=$1 text=$2
    shift 2
    "$@" >"$root/logs/last.log" 2>&1 || code=$?
    if [[ $code == "$wanted" ]]; then good "$text"; else bad "$text: exit code $code instead of $wanted: $(tail -n 3 "$root/logs/last.log" | tr '\n' ' ')"; fi
}
owned() { # owned FOLDER UID TEXT
    local other
    other=$(find "$1" ! -uid "$2" | head -1)
    [[ -e $1 && -z $other ]] && good "$3" || bad "$3: $1 ${other:-is not there}"
}

folder ordinary 1000
folder other 54321
mapfile -t ordinary < <(volumes ordinary)
mapfile -t other < <(volumes other)
hard=(--user 54321:54321 --read-only --cap-drop all --security-opt no-new-privileges --shm-size 8g --tmpfs /tmp)
image=limbeck-check:runtime

expect 7 "exit codes are passed on" started "$image" sh -c 'exit 7'
expect 143 "a process that ends by SIGTERM gives 143" started "$image" sh -c 'kill -TERM $$'
expect 0 "the user is 1000" started "$image" sh -c '[ "$(id -u)" = 1000 ]'
expect 0 "the bill of materials names torch $torch" started "$image" grep -A1 '"name": "torch"' /opt/limbeck/sbom.cdx.json
expect 0 "/dev/shm has 8 GB with --shm-size=8g" started --shm-size 8g "$image" sh -c '[ "$(df --output=size -k /dev/shm | tail -1)" -ge 8000000 ]'

expect 0 "python kd_train.py as user 1000" started --shm-size 8g "${ordinary[@]}" "$image" python kd_train.py --teacher python:nets.py:big \
    --student python:nets.py:small --data digits --temp 6.0 --alpha 0.7 --epochs 1 --out /workspace/checkpoints/kd
owned "$work/ordinary/checkpoints/kd" 1000 "its run belongs to user 1000"
expect 0 "limbeck demo as user 54321, root file system read-only, no capabilities" started "${hard[@]}" "${other[@]}" "$image" limbeck demo --out /workspace/checkpoints/demo
owned "$work/other/checkpoints/demo" 54321 "its run belongs to user 54321"
owned "$work/other/cache" 54321 "its caches belong to user 54321"

# SIGTERM: the run commits a checkpoint and leaves with 75, and the same command goes on.
long=(limbeck train --student python:nets.py:small --data digits --epochs 100000 --resume --out /workspace/checkpoints/long)
pod rm --force --ignore limbeck-check-long >/dev/null
lines() { if [[ -f $1 ]]; then wc -l <"$1"; else echo 0; fi; }
log=$work/ordinary/checkpoints/long/log.jsonl
for round in first second; do
    before=$(lines "$log")
    pod run --detach --name limbeck-check-long --network host "${limits[@]}" --stop-timeout 100 "${ordinary[@]}" "$image" "${long[@]}" >/dev/null
    for _ in $(seq 900); do
        (($(lines "$log") > before + 20)) && break
        sleep 1
    done
    pod stop --time 100 limbeck-check-long >/dev/null 2>&1 || true
    expect 75 "a run that is stopped by SIGTERM leaves with 75 ($round time)" sh -c "exit $(pod wait limbeck-check-long)"
    pod rm --force limbeck-check-long >/dev/null
done
grep -q '"resumed_from"' "$log" && good "the second one went on from the checkpoint of the first" || bad "the second one did not go on from the checkpoint of the first"

doctor() { started "$@" limbeck doctor --json >"$root/logs/doctor.json" 2>"$root/logs/last.log" || true; }
level() { python3 -c 'import json, sys; print(next((f["level"] for f in json.load(open(sys.argv[1]))["findings"] if f["name"] == sys.argv[2]), "absent"))' "$root/logs/doctor.json" "$1" 2>&1 | tail -1; }
finding() { [[ $(level "$1") == "$2" ]] && good "$3" || bad "$3: $1 is $(level "$1")"; }
doctor --user 0:0 --shm-size 64m "${ordinary[@]}" "$image"
finding "shared memory" warn "doctor warns of 64 MB of /dev/shm"
finding user warn "doctor warns of root in a container"
doctor --shm-size 8g "${hard[@]}" "${other[@]}" "$image"
finding "shared memory" ok "doctor is content with 8 GB of /dev/shm"
finding user ok "doctor is content with user 54321"
finding lock ok "doctor finds the versions of the lock"
finding "folder /workspace/checkpoints" ok "doctor finds checkpoints writable"

# -- jupyter, ci, serve ------------------------------------------------------------------------------------------------------------------------
pod rm --force --ignore limbeck-check-lab >/dev/null
pod run --detach --name limbeck-check-lab --network host "${limits[@]}" --env JUPYTER_TOKEN=of-this-check limbeck-check:jupyter \
    jupyter lab --ip=127.0.0.1 --port=18888 --no-browser >/dev/null
for _ in $(seq 120); do curl --silent --output /dev/null http://127.0.0.1:18888/login && break; sleep 1; done
status() { curl --silent --output /dev/null --write-out '%{http_code}' "$@"; }
[[ $(status http://127.0.0.1:18888/api/contents) == 403 ]] && good "jupyter: refused without the token" || bad "jupyter: not refused without the token"
[[ $(status -H 'Authorization: token of-this-check' http://127.0.0.1:18888/api/contents) == 200 ]] && good "jupyter: open with the token" || bad "jupyter: not open with the token"
pod rm --force --time 5 limbeck-check-lab >/dev/null

if [[ ${IMAGE_CHECK_FULL:-} == 1 ]]; then
    expect 0 "ci: make test and make test-long" started --shm-size 8g limbeck-check:ci make test test-long
else
    expect 0 "ci: a few of its tests" started --shm-size 8g limbeck-check:ci python -m pytest tests/unit/test_recipe.py tests/unit/test_deploy.py
    expect 0 "ci: make installs nothing" started limbeck-check:ci sh -c '! make --dry-run test | grep "pip install"'
fi

expect 0 "serve: no torch, and what it needs can be imported" started --read-only --cap-drop all --user 54321 limbeck-check:serve python -c '
import importlib.util, onnxruntime, numpy, fastapi, uvicorn, prometheus_client, PIL, tokenizers
assert importlib.util.find_spec("torch") is None'
expect 0 "serve: limbeck is there" started limbeck-check:serve limbeck --version
# The student of the run above, served without a file system of its own to write to, by another user than the one that trained it.
pod rm --force --ignore limbeck-check-serve >/dev/null
chmod -R a+rX "$work/ordinary/checkpoints/kd"
pod run --detach --name limbeck-check-serve --network host "${limits[@]}" --read-only --cap-drop all --security-opt no-new-privileges --user 54321:54321 --tmpfs /tmp \
    --stop-timeout 60 --volume "$work/ordinary/checkpoints/kd:/workspace/model:ro" limbeck-check:serve limbeck serve digits=/workspace/model --port 18889 >/dev/null
for _ in $(seq 120); do [[ $(status http://127.0.0.1:18889/v2/health/ready) == 200 ]] && break; sleep 1; done
curl --silent http://127.0.0.1:18889/v2/models/digits >"$root/logs/model.json" || true
question=$(python3 -c 'import json, sys
wanted = json.load(open(sys.argv[1]))["inputs"][0]
shape = [1, *(int(n) for n in wanted["shape"][1:])]
count = 1
for n in shape: count *= n
print(json.dumps({"inputs": [{"name": wanted["name"], "shape": shape, "datatype": wanted["datatype"], "data": [0.5] * count}]}))' "$root/logs/model.json" || true)
curl --silent --header 'Content-Type: application/json' --data "$question" http://127.0.0.1:18889/v2/models/digits/infer >"$root/logs/answer.json" || true
expect 0 "serve: the student answers, ten numbers an image" python3 -c 'import json, math, sys
answer = json.load(open(sys.argv[1]))["outputs"][0]
assert answer["shape"] == [1, 10] and all(map(math.isfinite, answer["data"])), answer' "$root/logs/answer.json"
expect 0 "serve: its page is there" sh -c "curl --silent --fail http://127.0.0.1:18889/ | grep -qi '<html'"
pod stop --time 60 limbeck-check-serve >/dev/null 2>&1 || true
expect 0 "serve: SIGTERM ends it with 0" sh -c "exit $(pod wait limbeck-check-serve)"
pod rm --force limbeck-check-serve >/dev/null

say ""
say "| target | size | build |"
say "|---|---:|---:|"
for target in "${targets[@]}"; do say "| $target | $((size[$target] / 1000000)) MB | ${seconds[$target]} s |"; done
say ""
say "$held passed, $failed failed"
[[ $failed == 0 ]]
