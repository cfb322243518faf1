"""Turns the GGUF copy of SmolLM2-135M-Instruct into a Hugging Face directory: `convert_gguf.py MODEL.gguf OUT_DIR`.

The weights are de-quantised by transformers and saved in fp32 with tied embeddings. The tokenizer is built here from
the GGUF's vocabulary, because the one transformers 4.57 derives from it differs from the model's own: it prepends
<|im_start|>, does not split digits, calls <|im_start|> the end of the text and keeps SentencePiece's byte fallback.
Knows nothing of downloads or caches.
"""

import argparse
from pathlib import Path

import torch
from gguf import GGUFReader, TokenType
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2TokenizerFast

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
END_OF_TURN = "<|im_end|>"


def build_tokenizer(gguf: GGUFReader) -> Tokenizer:
    """Byte-level BPE with single digits and no BOS, as in the model's own tokenizer.json.

    llama.cpp writes the pre-tokenizer only as the name `smollm`, which stands for: split off every character of the
    Unicode class N, then GPT-2's regular expression.

    Raises:
        ValueError: the GGUF names another tokenizer, so this recipe would tokenize wrongly.
    """
    kind = (_field(gguf, "tokenizer.ggml.model"), _field(gguf, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the GGUF's tokenizer is {kind}, expected ('gpt2', 'smollm'); convert another model by hand")
    tokens = [str(token) for token in gguf.fields["tokenizer.ggml.tokens"].contents()]
    merges = [str(merge) for merge in gguf.fields["tokenizer.ggml.merges"].contents()]
    kinds = gguf.fields["tokenizer.ggml.token_type"].contents()
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    )
    return tokenizer


def convert(path: Path, out: Path) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer's files to `out`."""
    gguf = GGUFReader(path)
    tokenizer = build_tokenizer(gguf)
    fast = GPT2TokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token=END_OF_TURN,
        pad_token=END_OF_TURN,
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", END_OF_TURN],
        add_prefix_space=False,
        clean_up_tokenization_spaces=False,
        model_max_length=_field(gguf, "llama.context_length"),
    )
    fast.chat_template = _field(gguf, "tokenizer.chat_template")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The GGUF carries 1e-5 as the nearest float32, and its own title for the model.
    model.config.rms_norm_eps = 1e-5
    del model.config._model_name_or_path
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id
    )
    model.save_pretrained(out, safe_serialization=True, max_shard_size="2GB")
    # It is written readable by its owner alone, unlike the files beside it.
    (out / "model.safetensors").chmod(0o644)
    fast.save_pretrained(out, legacy_format=False, save_jinja_files=False)


def _field(gguf: GGUFReader, name: str) -> object:
    field = gguf.get_field(name)
    if field is None:
        raise ValueError(f"the GGUF lacks the field {name}; it is not a copy of {HUB_ID}")
    return field.contents()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=f"Converts the GGUF of {HUB_ID} to a Hugging Face directory.")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    convert(arguments.gguf, arguments.out)


if __name__ == "__main__":
    main()
