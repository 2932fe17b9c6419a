#!/bin/sh
# New pairs and due retries, then vectors, then the index. A step that fails ends the night.
# On a cluster: export RAY_API_SERVER_ADDRESS=http://HEAD:8265, and each step is submitted as a Ray job.
set -eu
: "${WORKSPACE:=/srv/clipmill/ws}" "${PAIRS:=/srv/clipmill/pairs}"
bin=.venv/bin

step() {
    name=$1
    shift
    if [ -n "${RAY_API_SERVER_ADDRESS:-}" ]; then
        # An id used twice is refused: a night that is started twice runs once.
        "$bin/ray" job submit --working-dir . --submission-id "$name-$(date +%F)" \
            -- python -m "jobs.$name" --workspace "$WORKSPACE" --address auto --json "$@"
    else
        "$bin/clipmill" "$name" --workspace "$WORKSPACE" --json "$@"
    fi
}

step download --config conf/download.yaml --pairs "$PAIRS"
step embed --config conf/embed.yaml
step index --config conf/index.yaml
