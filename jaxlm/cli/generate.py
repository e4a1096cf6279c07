"""Continues texts, or answers messages.

    jaxlm generate MODEL --prompt "Once upon a time" --max-new-tokens 64 --temperature 0.8

Generation is greedy unless a temperature is given or the model's generation_config.json asks for sampling. With --beam,
beam search looks for the most likely continuation.
"""

from __future__ import annotations

import argparse

from jaxlm.cli.arguments import add_generation, add_kv_cache, add_model, with_generation
from jaxlm.cli.output import print_notes

_SHORT = 128  # new tokens; a longer text is worth the longer start of layers that are not stacked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, adapter=True)
    add_kv_cache(parser)
    parser.add_argument("--prompt", metavar="TEXT", action="append", required=True,
                        help="the text to continue, with the special tokens that it spells; may be repeated")
    parser.add_argument("--chat", action="store_true", help="prompts are messages of a user, for the chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: a system message before each prompt")
    parser.add_argument("--max-new-tokens", type=int, metavar="N",
                        help="tokens of a continuation (default: the model's, or 64)")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the model's, or 0)")
    parser.add_argument("--top-k", type=int, metavar="N", help="sample from the N most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, metavar="X",
                        help="sample from the most likely tokens with total probability X")
    parser.add_argument("--min-p", type=float, metavar="X",
                        help="sample from tokens at least X times as likely as the best")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (0)")
    parser.add_argument("--stop", metavar="TEXT", action="append", help="end before this text; may be repeated")
    parser.add_argument("--beam", type=int, metavar="N",
                        help="width of the beam; 1: no beam search (default: the model's, or 1)")
    parser.add_argument("--length-penalty", type=float, metavar="X", help="exponent of the length in beam search")
    add_generation(parser)


def run(args: argparse.Namespace) -> None:
    import jaxlm

    stacked = (args.max_new_tokens or 0) <= _SHORT
    lm = with_generation(
        jaxlm.load(args.model, adapter=args.adapter, kv_cache=args.kv_cache, stacked=stacked), args
    )
    print_notes(lm)
    prompts = args.prompt
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        prompts = [[*system, {"role": "user", "content": text}] for text in args.prompt]
    texts = lm.generate(
        prompts, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
        top_p=args.top_p, min_p=args.min_p, seed=args.seed, stop=args.stop, beam=args.beam,
        length_penalty=args.length_penalty,
    )
    shown = texts if args.chat else [prompt + text for prompt, text in zip(args.prompt, texts, strict=True)]
    print("\n\n".join(shown))
