# The experiment graph of the replication report, for Snakemake: model x shard of pictures -> rankings -> properties; model -> edits.
# `mmn replicate run` writes settings.json and calls Snakemake in the folder of the run; every rule is one call of `mmn replicate step`.
import sys

configfile: "settings.json"

MODELS = list(config["models"])
SHARDS = list(range(config["shards"]))
STEP = f"{sys.executable} -m mmn.cli replicate step --out ."

wildcard_constraints:
    shard=r"\d+",

rule all:
    input:
        expand("parts/{model}/properties-{shard}.csv", model=MODELS, shard=SHARDS),
        expand("parts/{model}/edits.csv", model=MODELS if config["edits"] else []),

rule rankings:
    output:
        "parts/{model}/captions-{shard}.csv", "parts/{model}/rankings-{shard}.csv",
        "parts/{model}/rankings-problems-{shard}.csv", "parts/{model}/model-{shard}.json",
    log: "logs/{model}-rankings-{shard}.log"
    threads: workflow.cores
    resources: gpu=config["gpus"], mem_mb=config["mem_mb"], runtime=config["minutes"]
    shell: STEP + " rankings --model {wildcards.model} --shard {wildcards.shard} 2> {log}"

rule properties:
    input: "parts/{model}/captions-{shard}.csv"
    output: "parts/{model}/properties-{shard}.csv", "parts/{model}/properties-problems-{shard}.csv"
    log: "logs/{model}-properties-{shard}.log"
    threads: workflow.cores
    resources: gpu=config["gpus"], mem_mb=config["mem_mb"], runtime=config["minutes"]
    shell: STEP + " properties --model {wildcards.model} --shard {wildcards.shard} 2> {log}"

rule edits:
    input: expand("parts/{{model}}/captions-{shard}.csv", shard=SHARDS)
    output: "parts/{model}/edits.csv", "parts/{model}/edits-problems.csv"
    log: "logs/{model}-edits.log"
    threads: workflow.cores
    resources: gpu=config["gpus"], mem_mb=config["mem_mb"], runtime=config["minutes"]
    shell: STEP + " edits --model {wildcards.model} 2> {log}"
