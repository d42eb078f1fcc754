#!/usr/bin/env bash
# Trains the checkpoint that ships, stage by stage, from the folder of public data that its model card names.
# About three quarters of an hour on two cores. A stage that is done stays; run it again to go on after a crash.
#
#   jobs/train/polar_tiny.sh DATA [BUILD]
set -euo pipefail

data=${1:?"folder of the public data, see polar_ray/checkpoints/polar-tiny/README.md"}
build=${2:-build}

pairs() { # stage, groups, seed
    python jobs/train/make_pairs.py --data "$data" --stage "$1" --groups "$2" --seed "$3" --output "$build/pairs/$1.parquet"
}

train() { # stage, stage before it, then settings
    local stage=$1 before=$2
    shift 2
    polar-ray train "$build/pairs/$stage.parquet" --model "$build/polar-tiny-$before" --output "$build/polar-tiny-$stage" \
        --config jobs/train/tiny.toml "${@/#/--set=}"
}

python jobs/make_default_checkpoint.py --output "$build/polar-tiny-base" --overwrite
pairs copy 16000 1
pairs answers 12000 2
pairs likeness 12000 4
pairs everything 14000 3
python jobs/train/make_pairs.py --data "$data" --stage held-out --output "$build/pairs/held-out.parquet"

train copy base max_packed_tokens=2048 max_steps=400
train answers copy max_steps=500
train likeness answers max_steps=900 optimizer.muon_learning_rate=2.5e-3 optimizer.learning_rate=6e-4
train everything likeness max_steps=400 optimizer.muon_learning_rate=1.5e-3 optimizer.learning_rate=4e-4 \
    save_dtype=bfloat16

styled="$build/polar-tiny-styled"
[ -e "$styled/model.safetensors" ] || python jobs/train/add_style.py "$build/polar-tiny-everything" --data "$data" \
    --pairs "$build/pairs/everything.parquet" --output "$styled"

polar-ray evaluate "$build/pairs/held-out.parquet" --by source --model "$styled" \
    --set engine.dtype=bfloat16 --output "$build/polar-tiny-held-out"
