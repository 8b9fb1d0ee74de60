# The experiment graph of the replication report, for Snakemake: model x shard of pictures -> rankings -> properties; model -> edits.
# `mmn replicate run` writes settings.json and machine.json and calls Snakemake in the folder of the run; every rule is one call of
# `mmn replicate step`. A piece that was killed says so in its log.
import shlex
import sys

configfile: "settings.json"
configfile: "machine.json"

MODELS = list(config["models"])
SHARDS = list(range(config["shards"]))
PYTHON = shlex.quote(sys.executable).replace("{", "{{").replace("}", "}}")
STEP = f"{PYTHON} -m mmn.cli replicate step --out ."
KILLED = "|| {{ s=$?; [ $s -lt 128 ] || echo \"it was killed (exit status $s): for want of memory?\" >> {log}; exit $s; }}"
RANKINGS = [f"parts/{{model}}/{name}-{{shard}}.csv" for name in ("captions", "rankings", "rankings-problems")]
RANKINGS += ["parts/{model}/model-{shard}.json"]
PROPERTIES = ["parts/{model}/properties-{shard}.csv", "parts/{model}/properties-problems-{shard}.csv"]
EDITS = ["parts/{model}/edits.csv", "parts/{model}/edits-problems.csv"]

wildcard_constraints:
    shard=r"\d+",

rule all:
    input:
        expand(RANKINGS + PROPERTIES, model=MODELS, shard=SHARDS),
        expand(EDITS, model=MODELS if config["edits"] else []),

rule rankings:
    output: RANKINGS
    log: "logs/{model}-rankings-{shard}.log"
    threads: config["cpus"]
    resources: gpu=config["gpus"], mem_mb=config["mem_mb"], runtime=config["minutes"]
    shell: STEP + " rankings --model {wildcards.model} --shard {wildcards.shard} 2> {log} " + KILLED

rule properties:
    input: "parts/{model}/captions-{shard}.csv"
    output: PROPERTIES
    log: "logs/{model}-properties-{shard}.log"
    threads: config["cpus"]
    resources: gpu=config["gpus"], mem_mb=config["mem_mb"], runtime=config["minutes"]
    shell: STEP + " properties --model {wildcards.model} --shard {wildcards.shard} 2> {log} " + KILLED

rule edits:
    input: expand("parts/{{model}}/captions-{shard}.csv", shard=SHARDS)
    output: EDITS
    log: "logs/{model}-edits.log"
    threads: config["cpus"]
    resources: gpu=config["gpus"], mem_mb=config["mem_mb"], runtime=config["minutes"]
    shell: STEP + " edits --model {wildcards.model} 2> {log} " + KILLED
