"""Continues texts. Greedy unless a temperature is given; a beam searches for the most likely continuation."""

from __future__ import annotations

from jaxlm.cli.arguments import add_kv_cache, add_model


def add_arguments(parser) -> None:
    add_model(parser, adapter=True)
    add_kv_cache(parser)
    parser.add_argument("--prompt", metavar="TEXT", action="append", required=True, help="may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (0)")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="of the N likeliest; 0: all (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="of the likeliest that make up X (1)")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="X", help="of those at least X times the best (0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (0)")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before TEXT; may be repeated")
    parser.add_argument("--beam", type=int, default=1, metavar="N", help="1: no search (1)")
    parser.add_argument("--length-penalty", type=float, default=1.0, metavar="X", help="of the beam search (1)")


def run(args) -> None:
    import jaxlm

    lm = jaxlm.load(args.model, adapter=args.adapter, kv_cache=args.kv_cache)
    texts = lm.generate(
        args.prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
        top_p=args.top_p, min_p=args.min_p, seed=args.seed, stop=args.stop, beam=args.beam,
        length_penalty=args.length_penalty,
    )
    print("\n\n".join(prompt + text for prompt, text in zip(args.prompt, texts, strict=True)))
