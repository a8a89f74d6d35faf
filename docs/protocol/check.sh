#!/usr/bin/env bash
# Checks queues.pml: every sound configuration must show no error, every planted bug must show its own. README.md tells what they mean.
# Exit status: 0 all is as expected, 1 something is not, 2 a tool is missing.
set -euo pipefail

if ! command -v spin > /dev/null; then
    echo "check.sh needs SPIN: install it with 'apt-get install spin'" >&2
    exit 2
fi
if ! command -v cc > /dev/null; then
    echo "check.sh needs a C compiler: install one with 'apt-get install gcc'" >&2
    exit 2
fi

model=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/queues.pml
readonly model
readonly at_once=2       # searches
readonly memory_mib=900  # for each of them
readonly depth=1000000   # steps; a search that is cut off counts as a failure

folder=$(mktemp -d)
readonly folder
set -m # a process group for each search: stopped from outside, none outlives its folder
trap 'for job in $(jobs -p); do kill -- "-$job" 2> /dev/null || true; done; rm -rf "$folder"' EXIT
trap 'exit 1' INT TERM

# What a verifier's output says was found, in a word or two.
found_in() {
    case $(grep -m1 '^pan:1:' "$1" || true) in
        *'blocked['*) echo 'lost wake-up' ;;
        *'first=='*) echo 'wrong frame' ;;
        *'memory['*) echo 'answer lost' ;;
        *'(free)'*) echo 'queue full' ;;
        *'q_full'*) echo 'store buffer too small' ;;
        *'invalid end state'*) echo 'deadlock' ;;
        *'acceptance cycle'*) echo 'no progress' ;;
        '') if grep -q 'errors: 0' "$1" && ! grep -q 'not completed\|too small\|out of memory' "$1"; then echo nothing; else echo failure; fi ;;
        *) echo 'another error' ;;
    esac
}

# search EXPECTED safety|progress|progress_only NAME MACRO... : one search, one line.
# safety: assertions and invalid end states; progress: assertions and the claim, under weak fairness; progress_only: the claim alone.
search() {
    local expected=$1 kind=$2 name=$3 compile search found seconds states
    shift 3
    cd "$(mktemp -d "$folder/XXXXXX")"
    case $kind in
        safety) compile='-DSAFETY -DNOCLAIM' search='' ;;
        progress) compile='-DNFAIR=3' search='-a -f' ;;
        progress_only) compile='-DNFAIR=3' search='-a -f -A' ;;
    esac
    cp "$model" .
    # -DNOREDUCE: partial order reduction saves a fifth of the states, and asks for care with `unless` and with fairness.
    # shellcheck disable=SC2086
    {
        spin -a "${@/#/-D}" queues.pml && cc -O1 -w -DNOREDUCE -DMEMLIM=$memory_mib $compile -o pan pan.c && ./pan -m$depth $search
    } > out 2>&1 || true
    found=$(found_in out)
    states=$(awk '/states, stored/ { print $1 }' out)
    seconds=$(awk '/elapsed time/ { print $4 }' out)
    local mark=ok
    if [[ $found != "$expected" ]]; then
        mark=BAD
        echo "$name ($kind, $*): expected $expected, found $found" >> "$folder/failures"
        if [[ $found == failure ]]; then tail -n 20 out >> "$folder/failures"; fi
    fi
    printf '%-4s %-52s %-13s %9s states %6s s  %s\n' "$mark" "$name" "$kind" "${states:--}" "${seconds:--}" "$found"
    echo "$expected" >> "$folder/done"
}

asked=0

# As `search`, beside others.
check() {
    asked=$((asked + 1))
    while (($(jobs -rp | wc -l) >= at_once)); do
        wait -n || true
    done
    search "$@" &
}

begun=$SECONDS
: > "$folder/failures"
: > "$folder/done"

check nothing safety 'calls, depth 1' DEPTH=1 CALLS=4
check nothing safety 'calls, depth 2' DEPTH=2 CALLS=4
check nothing safety 'stream, depth 1' STREAM DEPTH=1 CALLS=6
check nothing safety 'stream, depth 2' STREAM DEPTH=2 CALLS=6
check nothing safety 'time-outs, depth 1' TIMEOUTS DEPTH=1 CALLS=3
check nothing safety 'time-outs, depth 2' TIMEOUTS DEPTH=2 CALLS=3
check nothing safety 'deaths, depth 1' TIMEOUTS DEATHS DEPTH=1 CALLS=3
check nothing safety 'deaths, depth 2' TIMEOUTS DEATHS DEPTH=2 CALLS=2
check nothing progress 'calls, depth 1' DEPTH=1 CALLS=2
check nothing progress 'calls, depth 2' DEPTH=2 CALLS=2
check nothing progress 'stream, depth 2' STREAM DEPTH=2 CALLS=4
check nothing progress 'time-outs, depth 1' TIMEOUTS DEPTH=1 CALLS=2
check nothing progress 'time-outs, depth 2' TIMEOUTS DEPTH=2 CALLS=2
check nothing progress 'deaths, depth 1' TIMEOUTS DEATHS DEPTH=1 CALLS=2
check nothing progress_only 'time-outs make up for lost rings: no fence' TIMEOUTS NO_FENCE STORES=3 DEPTH=1 CALLS=2
check nothing safety 'counting calls makes up for Q1: no claim' NO_CLAIM DEPTH=1 CALLS=3
check nothing safety 'counting calls makes up for Q3: taken first' TAKEN_FIRST DEPTH=1 CALLS=3

check 'wrong frame' safety 'NO_CLAIM: a slot is filled unasked (Q1)' NO_CLAIM STREAM CALLS=4
check 'wrong frame' safety 'SEQUENCE_FIRST: before the frame (Q2)' SEQUENCE_FIRST CALLS=3
check 'wrong frame' safety 'TAKEN_FIRST: before the copy (Q3)' TAKEN_FIRST STREAM CALLS=4
check 'lost wake-up' safety 'NO_FENCE (D1)' NO_FENCE CALLS=3
check 'lost wake-up' safety 'NO_FENCE_IN_WAIT (D1)' NO_FENCE_IN_WAIT CALLS=3
check 'lost wake-up' safety 'NO_FENCE_IN_PUBLISH (D1)' NO_FENCE_IN_PUBLISH CALLS=3
check 'lost wake-up' safety 'NO_RECHECK: word up, then blocked at once (D1)' NO_RECHECK CALLS=3
check 'lost wake-up' safety 'RING_FIRST: rung, then the word taken down (D4)' RING_FIRST CALLS=3
check 'lost wake-up' safety 'RING_UNORDERED: the ring overtakes the word (D4)' RING_UNORDERED CALLS=3
check deadlock safety 'a death without time-outs (D3)' DEATHS CALLS=3
check 'no progress' progress 'DEATH_UNSEEN: nobody looks at the peer (D3)' DEATH_UNSEEN TIMEOUTS DEATHS CALLS=2
check 'answer lost' safety 'UNREAD_LOST: the last answers of the dead unread' UNREAD_LOST TIMEOUTS DEATHS DEPTH=1 CALLS=2
while (($(jobs -rp | wc -l))); do
    wait -n || true
done

holding=$(grep -cx nothing "$folder/done" || true)
planted=$(grep -cvx nothing "$folder/done" || true)
if [[ -s $folder/failures ]] || ((holding + planted != asked)); then
    echo
    cat "$folder/failures"
    echo "not as expected: see above ($((holding + planted)) of $asked searches done, $((SECONDS - begun)) s)"
    exit 1
fi
echo "$holding configurations hold, $planted planted bugs are found ($((SECONDS - begun)) s)"
