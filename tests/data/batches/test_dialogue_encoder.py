"""Dialogues: in every form, which tokens are learned, beside transformers and by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.data.batches.dialogue_encoder import DialogueEncoder
from jaxlm.data.batches.encoding import encode_documents
from jaxlm.data.sources.dialogues import Chat, Completion, chat_row, instruct_row, preference_row
from jaxlm.data.sources.jsonl import RowError
from jaxlm.data.sources.spec import open_source
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from tests.data.tokenizers.test_chat_template import CHATML, GEMMA, LLAMA3, MISTRAL, SYSTEM, TALK, tokenizer

UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
THINKING = UNMARKED.replace(  # as Qwen3: thoughts only in the last reply
    "{{ message.content }}<|im_end|>\n    {%- else",
    "{% if loop.last %}<think></think>{% endif %}{{ message.content }}<|im_end|>\n    {%- else",
)
TURNS = [*TALK, {"role": "assistant", "content": " Because of order.\n"}]
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|eot|>", "<end_of_turn>"]


def made(template, directory) -> Tokenizer:
    """One whose turns end in special tokens."""
    tokenizer(template, directory)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in SPECIALS:
        index = len(content["model"]["vocab"])
        content["added_tokens"].append(content["added_tokens"][0] | {"content": token, "id": index})
        content["model"]["vocab"][token] = index
    path.write_text(json.dumps(content))
    return Tokenizer.load(directory)


def learned(found: Tokenizer, row) -> list[str]:
    """The runs of tokens that are learned, as text."""
    ids, mask = DialogueEncoder(found)(row)
    assert mask[-1] and ids.dtype == np.int32
    runs = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)
    return [found.decode(run, skip_special=False) for run in runs[0 if mask[0] else 1 :: 2]]


@pytest.mark.parametrize("template, end", [
    (LLAMA3, "<|eot|>"), (MISTRAL, "</s>"), (CHATML, "<|im_end|>"), (UNMARKED, "<|im_end|>"), (THINKING, "<|im_end|>"),
    (GEMMA.replace("{{ ns.count }}{{ dict(a=1) }}", ""), "<end_of_turn>"),
], ids=["llama3", "mistral", "marked", "chatml", "thinking", "gemma"])
def test_replies_and_their_ends_are_learned_and_nothing_else(template, end, tmp_path):
    found = made(template, tmp_path)
    trimmed = template not in (MISTRAL, CHATML, UNMARKED, THINKING)
    last = TURNS[3]["content"].strip() if trimmed else TURNS[3]["content"]
    thought = "<think></think>" if template is THINKING else ""
    assert learned(found, Chat(TURNS)) == [TURNS[1]["content"] + end, thought + last + end]
    assert learned(found, Chat([TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]])) == [thought + last + end]
    ids, mask = DialogueEncoder(found)(Chat(TURNS))
    whole = found.encode_chat(TURNS, add_generation_prompt=False)
    assert ids.tolist() == whole[: len(ids)]
    prompt = found.encode_chat(TURNS[:1])
    assert ids[: len(prompt)].tolist() == prompt and not mask[: len(prompt)].any() and mask[len(prompt)]


def test_marked_replies_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    found = made(CHATML, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        SYSTEM + TURNS, return_assistant_tokens_mask=True, return_dict=True
    )
    ids, mask = DialogueEncoder(found)(Chat(SYSTEM + TURNS))
    n = len(ids)
    assert ids.tolist() == theirs["input_ids"][:n] and mask.tolist() == theirs["assistant_masks"][:n]
    assert not any(theirs["assistant_masks"][n:])


def test_completions_follow_prompts_as_they_are_given(tmp_path):
    found = made(CHATML, tmp_path)
    ids, mask = DialogueEncoder(found)(Completion("Is it 3?", " Yes"))
    assert ids.tolist() == [*found.encode("Is it 3?"), *found.encode(" Yes"), found.eos_id]
    assert mask.tolist() == [False] * 8 + [True] * (len(ids) - 8)
    joining = Tokenizer.train(["ab " * 9], vocab_size=262)
    ids, mask = DialogueEncoder(joining)(Completion("a", "b"))  # "ab" is one token, which the prompt does not end in
    assert ids.tolist() == [*joining.encode("a"), *joining.encode("b"), joining.eos_id] and mask.tolist() == [0, 1, 1]


def test_a_message_that_spells_special_tokens_is_text_beside_those_of_the_template(tmp_path):
    spelled = [{"role": "user", "content": "a<|im_end|>\n<|im_start|>b"}, {**TURNS[1], "weight": 0}, *TURNS[2:]]
    for template in (CHATML, UNMARKED):
        found = made(template, tmp_path)
        ids, mask = DialogueEncoder(found)(Chat(spelled))
        assert ids.tolist() == found.encode_chat(spelled, add_generation_prompt=False)[: len(ids)]
        assert found.decode(ids[mask], skip_special=False) == TURNS[3]["content"] + "<|im_end|>"
        assert (ids == found.vocabulary.special_tokens.index("<|im_end|>")).sum() <= 4


def test_templated_completions_have_special_tokens_where_asked(tmp_path):
    found = made(CHATML, tmp_path)
    start, end = (found.backend.special_tokens[token] for token in ("<|im_start|>", "<|im_end|>"))
    path = tmp_path / "x.jsonl"
    row = {"prompt": "<|im_start|>a\n", "completion": "b<|im_end|>"}
    path.write_text("".join(json.dumps(each) + "\n" for each in (row, row | {"completion": "b"})))
    parsed = encode_documents(open_source(f"instruct:{path}", prompt_special_tokens="parse"), found)
    plain = encode_documents(open_source(f"instruct:{path}", special_tokens="parse"), found)
    a, b = found.encode("a\n"), found.encode("b")
    assert parsed.ids.tolist() == [start, *a, *b, end, start, *a, *b, found.eos_id], "an end is not ended again"
    assert not np.isin(plain.ids, [start, end]).any() and (plain.ids == found.eos_id).sum() == 2


def test_instructions_with_a_template_and_without(tmp_path):
    row = instruct_row({"instruction": "Add.", "input": "1 1", "output": "2"})
    assert learned(made(CHATML, tmp_path / "a"), row) == ["2<|im_end|>"]
    plain = made(None, tmp_path / "b")
    ids, mask = DialogueEncoder(plain)(row)
    assert plain.decode(ids[~mask]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### "
        "Response:\n"
    )
    assert plain.decode(ids[mask]) == "2"
    assert "Input" not in instruct_row({"instruction": "Add.", "output": "2"}).without_template.prompt
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        DialogueEncoder(plain)(Chat(TURNS))


def test_forms_of_rows():
    share = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    chat = chat_row(share)
    assert chat.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert chat_row({"messages": chat.messages, "tools": []}) == chat
    assert instruct_row({"prompt": "a", "completion": "b"}) == Completion("a", "b")
    user, yes, no = ({"role": role, "content": text} for role, text in
                     (("user", "a"), ("assistant", "y"), ("assistant", "n")))
    muted = {**user, "weight": 0}
    assert instruct_row({"prompt": [user], "completion": [yes]}).messages == [muted, yes]
    texts = preference_row({"prompt": "a", "chosen": "y", "rejected": "n"})
    assert texts == (Completion("a", "y"), Completion("a", "n"))
    wanted = Chat([muted, yes]), Chat([muted, no])
    for row in (
        {"prompt": "a", "chosen": [yes], "rejected": [no]}, {"prompt": [user], "chosen": yes, "rejected": no},
        {"prompt": "a", "chosen": [user, yes], "rejected": [user, no]}, {"chosen": [user, yes], "rejected": [user, no]},
        {"prompt": [user], "chosen": "y", "rejected": "n"},
    ):
        assert preference_row(row) == wanted


@pytest.mark.parametrize("read, row, why", [
    (chat_row, {"text": "a"}, 'no "messages"'),
    (chat_row, {"messages": []}, '"messages" is not a list of messages'),
    (chat_row, {"messages": "hello"}, '"messages" is not a list of messages'),
    (chat_row, {"messages": [{"content": "a"}]}, 'a message without a "role"'),
    (chat_row, {"messages": [{"role": "user"}]}, 'a message without "content"'),
    (chat_row, {"messages": [{"role": "user", "content": "a"}]}, 'no reply of the "assistant"'),
    (chat_row, {"messages": [{"role": "assistant", "content": "a", "weight": 2}]}, 'a "weight" that is neither'),
    (chat_row, {"messages": TURNS, "tools": "add"}, '"tools" is not a list of objects'),
    (chat_row, {"conversations": [{"from": "nobody", "value": "a"}]}, 'unknown "from"'),
    (instruct_row, {"prompt": "a"}, 'neither "prompt" and "completion"'),
    (instruct_row, {"prompt": "a", "completion": ""}, 'an empty "completion"'),
    (instruct_row, {"instruction": "a", "output": " "}, 'an empty "output"'),
    (instruct_row, {"instruction": "a"}, 'no string under "output"'),
    (preference_row, {"chosen": "a"}, 'no "chosen" and "rejected"'),
    (preference_row, {"chosen": "a", "rejected": "b"}, 'no "prompt"'),
    (preference_row, {"prompt": "x", "chosen": "a", "rejected": "a"}, "are the same"),
])
def test_rows_that_are_no_good(read, row, why):
    with pytest.raises(RowError, match=why):
        read(row)


def test_what_a_template_refuses_is_a_bad_row(tmp_path):
    found = made(MISTRAL, tmp_path)
    rows = [TURNS, TURNS[1:], [TURNS[0], {"role": "assistant", "content": "a</s>"}, *TURNS[2:]], TURNS]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    encoded = encode_documents(open_source(f"chat:{path}", bad_rows="report"), found)
    one, mask = DialogueEncoder(found)(Chat(TURNS))
    assert encoded.ids.tolist() == [*one, *one] and encoded.loss_mask.tolist() == [*mask, *mask]
    assert "the chat template refuses this conversation: roles must take turns, user first (line 2)" in encoded.notes[0]
    assert "a reply that spells the special token </s> (line 3)" in encoded.notes[0]
    with pytest.raises(UserError, match="x.jsonl:2: the chat template refuses this conversation: roles must take"):
        encode_documents(open_source(f"chat:{path}"), found)


def test_templates_that_cannot_be_followed(tmp_path):
    shouting = "{% for m in messages %}{{ m.content ~ messages | length }}</s>{% endfor %}"
    with pytest.raises(RowError, match="an earlier turn"):
        DialogueEncoder(made(shouting, tmp_path))(Chat(TURNS))
    once = "{% if loop.last %}{% generation %}x{% endgeneration %}{% endif %}"
    half = UNMARKED.replace("{{ message.content }}", once + "{{ message.content }}", 1)
    with pytest.raises(RowError, match="2 replies.* marks 1"):
        DialogueEncoder(made(half, tmp_path))(Chat(TURNS))
