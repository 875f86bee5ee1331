#!/usr/bin/env bash
# Train, export and score in one go on one GPU: demo/run.sh OUT SECONDS [ARGUMENTS OF demo.train]. Everything goes to OUT.
set -euo pipefail
out=$1 seconds=$2
shift 2
mkdir -p "$out/model"
cp src/saddle/demo_model/tokenizer*.json "$out/model/"
python3 -m demo.train "$out" --seconds "$seconds" --tokenizer "$out/model/tokenizer.json" "$@"
python3 -m demo.export "$out" "$out/model"
python3 -m demo.score --run "$out" --cases 1000 --show 5 --tokenizer "$out/model/tokenizer.json" --out "$out/scores.json"
echo done
