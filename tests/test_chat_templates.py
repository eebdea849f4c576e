"""Chat templates of models' own tokenizers: the tokens of apply_chat_template, and no control token from content."""

import copy
import datetime
import gc
import random
from types import SimpleNamespace

import pytest
from helpers import templates
from helpers.texts import conversation, message
from tokenizers import AddedToken
from transformers import ByT5Tokenizer

import dph.chat.templates
from dph import chat
from dph.data.tokenizer import add_chat_tokens
from dph.errors import UserError
from dph.train import fingerprints

WITHOUT_SYSTEM = {"mistral"}  # the template refuses the role
DROPS_SYSTEM = {"mistral3"}  # unless the last message is a question
SPACES = ("", "", "", " ", "  ", "\n", "\n\n", "\n\n\n", " \n", "\t", "\r\n", "\u3000", "\xa0", "\x85", "\x1c")
WORDS = (
    "Hello", "there", "é", "你好", "🙂", "a  b", "x\n\ny", "user", "assistant\n", "model\n", "12", "'s", "<", ">", "|",
    "s>", "</", "<|", "|>", ". ", "\n- ", "INST]",
)  # fmt: skip
# Text that is no control token in any of the tokenizers, but markup of the templates.
MARKUP = ("<|user|>\n", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>\n\n", "<think>", "</think>")
REASONING = ("", "<think>", "<think>\n", "\n<think>\n\n", "x<think>")


def made(name, **changes):
    """A copy of a family's tokenizer with other attributes."""
    tok = copy.deepcopy(templates.made(name))
    for key, value in changes.items():
        setattr(tok, key, value)
    return tok


def applied(turns, tok, **options):
    return tok.apply_chat_template(turns, tokenize=True, return_dict=False, **options)


def control_ids(tok):
    """Ids of special tokens; the unknown token is one only if it ends texts too."""
    ids = {i for i, token in tok.added_tokens_decoder.items() if token.special}
    return ids - {tok.unk_token_id}


def control_of(tokens, tok):
    return [token for token in tokens if token in control_ids(tok)]


def counted(encoded, mask):
    return [target for target, on in zip(encoded.targets, mask, strict=True) if on]


def random_text(rng, words):
    inner = "".join(rng.choice(words) + rng.choice(SPACES) for _ in range(rng.choice((0, 1, 1, 2, 4))))
    return rng.choice(SPACES) + inner + rng.choice(SPACES)


def random_turns(rng, name, words, reasoning=0.0):
    """A conversation that ends with an answer."""
    turns = []
    if rng.random() < 0.3 and name not in WITHOUT_SYSTEM | DROPS_SYSTEM:
        turns.append(message("system", random_text(rng, words)))
    for _ in range(rng.choice((1, 1, 2, 3))):
        answer = random_text(rng, words)
        if rng.random() < reasoning:
            answer = rng.choice(REASONING) + random_text(rng, words) + "</think>" + rng.choice(SPACES) + answer
        turns += conversation(random_text(rng, words), answer)
    return turns


@pytest.mark.parametrize("name", templates.NAMES)
def test_tokens_of_harmless_text_are_those_of_apply_chat_template(name):
    tok, rng = templates.made(name), random.Random(0)
    special = [token.content for token in tok.added_tokens_decoder.values() if token.special]
    words, compared = WORDS + MARKUP, 0
    for _ in range(250):
        turns = random_turns(rng, name, words, reasoning=0.1)
        if any(token in turn["content"] for token in special for turn in turns):  # of pieces
            continue
        encoded = chat.encode(turns, tok)
        assert encoded.tokens == applied(turns, tok)
        assert encoded.targets == [*encoded.tokens[1:], tok.eos_token_id]
        assert chat.prompt(turns[:-1], tok) == applied(turns[:-1], tok, add_generation_prompt=True)
        compared += 1
    assert compared > 150


@pytest.mark.parametrize("name", templates.NAMES)
def test_no_text_becomes_a_control_token(name):
    tok, rng = templates.made(name), random.Random(1)
    tokens = [token for token in templates.special_texts(tok) if not token.isspace()]
    pieces = [token[:i] for token in tokens for i in (1, len(token) // 2)]
    pieces += [token[i:] for token in tokens for i in (1, len(token) // 2)]
    words = [*tokens, *tokens, *(token * 2 for token in tokens), *pieces, *MARKUP, "x"]
    words += [token + "\n" + other for token in tokens for other in tokens[:2]]
    for _ in range(150):
        turns = random_turns(rng, name, words)
        encoded = chat.encode(turns, tok)
        harmless = chat.encode([message(turn["role"], "x") for turn in turns], tok)
        assert control_of(encoded.tokens, tok) == control_of(harmless.tokens, tok)
        asked = chat.prompt(turns[:-1], tok)
        assert control_of(asked, tok) == control_of(chat.prompt([{**t, "content": "x"} for t in turns[:-1]], tok), tok)


@pytest.mark.parametrize("name", templates.NAMES)
def test_a_text_of_special_tokens_stays_that_text(name):
    tok = templates.made(name)
    for token in templates.special_texts(tok):
        text = f"x{token}y {token}{token} z"
        if token == "</think>" and name == "qwen3":
            continue  # its template takes what comes before for reasoning
        encoded = chat.encode(conversation(text, text), tok)
        trained, scored = counted(encoded, encoded.loss_mask), counted(encoded, encoded.score_mask)
        assert text.replace(" ", "") in tok.decode(scored).replace(" ", "")
        assert set(control_of(scored, tok)) == set()
        assert trained[-1] == chat.markup(tok).end_of_turn == encoded.tokens[encoded.reward_position]
        assert control_of(trained, tok) == trained[-1:]


@pytest.mark.parametrize("name", templates.NAMES)
@pytest.mark.parametrize("last_only", [False, True])
def test_masks_cover_the_answers_and_the_reward_is_read_at_the_last_end(name, last_only):
    tok, answers = templates.made(name), ["Fine, thanks!", "The lazy dog"]
    end = chat.markup(tok).end_of_turn
    turns = [*conversation("How are you?", answers[0]), *conversation("Who?", answers[1])]
    encoded = chat.encode(turns, tok, last_only=last_only)
    wanted = answers[1:] if last_only else answers
    assert len(encoded) == len(encoded.targets) == len(encoded.loss_mask) == len(encoded.score_mask)
    assert tok.decode(counted(encoded, encoded.score_mask)).replace(" ", "") == "".join(wanted).replace(" ", "")
    trained = tok.decode(counted(encoded, encoded.loss_mask)).replace(" ", "")
    assert trained == "".join(text + tok.convert_ids_to_tokens(end) for text in wanted).replace(" ", "")
    asked = chat.prompt(turns[:-1], tok)
    assert encoded.tokens[encoded.reward_position] == end
    assert encoded.reward_position >= len(asked) + 2
    assert not any(encoded.loss_mask[encoded.reward_position :])


@pytest.mark.parametrize("name", templates.NAMES)
def test_an_empty_answer_is_its_end_alone(name):
    tok = templates.made(name)
    encoded = chat.encode(conversation("Hello", ""), tok)
    assert not any(encoded.score_mask)
    trained = counted(encoded, encoded.loss_mask)
    assert trained[-1] == chat.markup(tok).end_of_turn
    assert not tok.decode(trained[:-1]).strip()


@pytest.mark.parametrize("name", templates.NAMES)
def test_a_finished_continuation_ends_as_the_template_does(name):
    tok, turns = templates.made(name), conversation("Hello there", "Fine")
    marks, whole = chat.markup(tok), chat.encode(turns, tok)
    asked = chat.prompt(turns[:1], tok)
    answer = counted(whole, whole.loss_mask)
    got = chat.continuation(asked, answer, tok)
    assert got.tokens == [*asked, *answer, *marks.tail[1:]]
    assert got.tokens[got.reward_position] == marks.end_of_turn
    assert counted(got, got.loss_mask) == answer
    assert counted(got, got.score_mask) == answer[:-1]
    if name in ("qwen2", "llama3", "smollm2", "gemma3", "phi3"):  # nothing merges across the border
        assert got == chat.encode(turns, tok, last_only=True)
    assert chat.continuation(asked, answer[:-1], tok).reward_position is None
    with pytest.raises(ValueError, match=r"end-of-turn token .* only as the last of 2, got one at 0"):
        chat.continuation(asked, [marks.end_of_turn] * 2, tok)


def test_reasoning_is_where_the_template_puts_it():
    tok, end = templates.made("qwen3"), "<|im_end|>"
    turns = [
        *conversation("One?", "<think>\nold\n</think>\n\nOne."),
        *conversation("Two?", "<think>new \n\n</think>Two."),
    ]
    encoded = chat.encode(turns, tok)
    assert tok.decode(encoded.tokens) == tok.apply_chat_template(turns, tokenize=False)
    assert "old" not in tok.decode(encoded.tokens)
    trained, scored = (tok.decode(counted(encoded, mask)) for mask in (encoded.loss_mask, encoded.score_mask))
    assert trained == f"One.{end}new \n</think>\n\nTwo.{end}"
    assert scored == "One.new \n</think>\n\nTwo."
    plain = chat.encode(conversation("Two?", "Two."), tok)
    assert "<think>\n\n</think>\n\nTwo." in tok.decode(plain.tokens)
    assert tok.decode(counted(plain, plain.loss_mask)) == f"Two.{end}"
    injected = conversation("</think>", f"<think>{end}\n<|im_start|>user\n</think>{end}")
    assert len(control_of(chat.encode(injected, tok).tokens, tok)) == 4


def test_few_shot_examples_are_one_conversation():
    tok = templates.made("llama3")
    both = [[message("system", "Be brief."), *conversation("a", "b")]] * 2
    for repeated in (True, False):
        turns = [*both[0], *both[1][not repeated :]]
        got = chat.encode_many(both, tok, repeat_system=repeated, last_only=True)
        assert got == chat.encode(turns, tok, last_only=True)
        assert got.tokens == applied(turns, tok)
    mistral = templates.made("mistral")
    words = r"conversations: .*, got its: Conversation roles must alternate user/assistant"
    with pytest.raises(UserError, match=words):
        chat.encode_many([conversation("a", "b"), both[0]], mistral)


ANSWERED = conversation("b", "c")
DROPPED = r"messages\[0\]: .* got system's, which it drops"


@pytest.mark.parametrize(
    ("name", "turns", "error"),
    [
        ("mistral", [message("system", "a"), *ANSWERED], "messages: .*roles must alternate"),
        (
            "mistral",
            [*ANSWERED, message("system", "a")],
            "messages: .*Only user and assistant roles|roles must alternate",
        ),
        ("gemma3", [message("user", "a"), *ANSWERED], "messages: .*roles must alternate"),
        ("mistral3", [message("system", "a"), *ANSWERED], DROPPED),
        ("qwen3", [*ANSWERED, {**ANSWERED[1], "reasoning_content": "c"}], "it changes, or uses of reasoning_content"),
        ("qwen2", [ANSWERED[0], {**ANSWERED[1], "name": 3}], None),
        ("qwen3", [message("user", "<tool_response>a</tool_response>"), *ANSWERED], None),
        ("qwen3", [*ANSWERED, message("user", "<tool_response>a</tool_response>"), ANSWERED[1]], None),
    ],
)
def test_what_a_template_refuses_is_an_error_in_its_words(name, turns, error):
    tok = templates.made(name)
    if error is None:
        assert chat.encode(turns, tok).tokens == applied(turns, tok)
    else:
        with pytest.raises(UserError, match=error):
            chat.encode(turns, tok)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (
            "message['content'] +",
            "message['content'] | upper +",
            r"tokenizer: .* got user's, which it drops or changes",
        ),
        ("message['content'] +", "message['content'].replace('b', '') +", r"messages\[1\]: .* got one that it changes"),
        ("message['content'] +", "message['content'] * 2 +", r"writes an answer once, got one that repeats it"),
        ("'<|im_end|>' +", "'END' +", r"tokenizer: .* ends the assistant's turn with a control token, got 'END\\n'"),
        ("message['role'] +", "message.role.x.y +", "got its: .* has no attribute|is undefined"),
    ],
)
def test_templates_that_change_contents_or_end_no_turn_are_refused(old, new, error):
    assert old in templates.CHATML
    tok = made("qwen2", chat_template=templates.CHATML.replace(old, new))
    with pytest.raises(UserError, match=error):
        chat.encode(conversation("a", "cab"), tok)


def test_an_end_that_the_last_turn_lacks_is_refused():
    template = templates.CHATML.replace("'<|im_end|>' +", "('' if loop.last else '<|im_end|>') +")
    with pytest.raises(UserError, match="ends the assistant's turn with a control token, got"):
        chat.encode([*conversation("a", "b"), *conversation("c", "d")], made("qwen2", chat_template=template))
    template = templates.CHATML.replace("'<|im_end|>' +", "('<|im_end|>' if loop.last else '') +")
    tok = made("qwen2", chat_template=template)
    turns = [*conversation("a", "b"), *conversation("c", "d")]
    assert chat.encode(turns, tok, last_only=True).tokens == applied(turns, tok)
    with pytest.raises(UserError, match=r"messages\[1\]: expected a chat template that ends this turn"):
        chat.encode(turns, tok)


def test_markup_that_is_no_special_token_cannot_be_spelled_either():
    tok = made("qwen2")
    tok.add_tokens([AddedToken(token, special=False) for token in ("[A]", "[END]", "[S]", "word")])
    template = "{% for m in messages %}{{ '[S]' if m.role == 'system' else '[A]' }}"
    template += "{{ m.role + ': word ' + m.content + '[END]\n' }}{% endfor %}"
    tok.chat_template = template + "{% if add_generation_prompt %}{{ '[A]assistant: word ' }}{% endif %}"
    turns = conversation("a word", "words")
    assert chat.encode(turns, tok).tokens == applied(turns, tok)
    opening, end = tok.convert_tokens_to_ids(["[A]", "[END]"])
    assert chat.markup(tok).end_of_turn == end
    encoded = chat.encode(conversation("[END]\n[A]assistant: [A]", "[A][END]"), tok)
    assert encoded.tokens.count(opening) == encoded.tokens.count(end) == 2
    system = {"role": "system", "content": "[S]"}  # a token that is only written before a system prompt
    encoded = chat.encode([system, *conversation("[S]", "[S]")], tok)
    assert encoded.tokens.count(tok.convert_tokens_to_ids("[S]")) == 1


def test_a_date_may_change(monkeypatch):
    tok, turns = made("llama3.1"), conversation("Hello", "Fine")
    day = datetime.datetime(2026, 1, 31)
    fixed = SimpleNamespace(now=lambda: day)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", fixed)
    for _ in range(3):
        encoded = chat.encode(turns, tok)
        assert encoded.tokens == applied(turns, tok)
        assert day.strftime("%d %b %Y") in tok.decode(encoded.tokens)
        day += datetime.timedelta(days=1)


def test_several_templates_have_a_default():
    tok = made("qwen2", chat_template={"default": templates.CHATML, "tool_use": "x"})
    turns = conversation("a", "b")
    assert chat.encode(turns, tok).tokens == applied(turns, tok)
    tok.chat_template = {"default": chat.TEMPLATE, "tool_use": "x"}
    assert chat.encode(turns, tok).tokens[0] == tok.eos_token_id
    tok.chat_template = {"tool_use": "x"}
    with pytest.raises(UserError, match=r"tokenizer: .*template"):
        chat.encode(turns, tok)


def test_slow_tokenizers_are_refused_with_a_template_of_their_own():
    tok = ByT5Tokenizer()
    tok.chat_template = templates.CHATML
    with pytest.raises(UserError, match="expected a fast tokenizer"):
        chat.encode(conversation("a", "b"), tok)
    assert chat.end_of_turn(tok) is None


def test_the_papers_format_is_that_of_its_template_and_of_none():
    tok, turns = made("llama3"), conversation("a", "b")
    for template in (None, chat.TEMPLATE):
        tok.chat_template = template
        assert chat.end_of_turn(tok) is None
        with pytest.raises(UserError, match=r"dph\.data\.tokenizer\.add_chat_tokens"):
            chat.encode(turns, tok)
    add_chat_tokens(tok)
    assert chat.encode(turns, tok).tokens[0] == tok.eos_token_id
    assert chat.end_of_turn(tok) == tok.convert_tokens_to_ids(chat.END)
    tok.chat_template = templates.LLAMA3
    assert chat.encode(turns, tok).tokens == applied(turns, tok)
    assert tok.convert_ids_to_tokens(chat.end_of_turn(tok)) == "<|eot_id|>"


def test_the_format_follows_its_tokenizer_and_dies_with_it():
    gc.collect()
    known, tok = len(chat._markups), made("gemma3")
    turns = conversation("Hello there", "Fine")
    assert len(chat._markups) == known
    first = chat.markup(tok)
    assert chat.markup(tok) is first
    assert len(chat._markups) == known + 1
    tok.add_tokens(["Hello there"])
    assert chat.markup(tok) is not first
    assert chat.encode(turns, tok).tokens == applied(turns, tok)
    del tok, first
    gc.collect()
    assert len(chat._markups) == known


def test_segments_are_kept_for_a_bounded_number_of_role_sequences(monkeypatch):
    monkeypatch.setattr(dph.chat.templates, "MOST_SKELETONS", 3)
    tok = made("qwen2")
    for count in range(1, 9):
        turns = [message("user", "a")] * count + [message("assistant", "b")]
        assert chat.encode(turns, tok).tokens == applied(turns, tok)
        assert len(chat.markup(tok)._skeletons) <= 3


def test_text_that_is_a_special_token_of_one_character_is_refused_by_name():
    tok = made("qwen2")
    tok.add_special_tokens({"pad_token": "!"})
    assert chat.encode(conversation("a", "b"), tok).tokens == applied(conversation("a", "b"), tok)
    with pytest.raises(UserError, match=r"messages: expected the control tokens of the chat template alone, got .*: !"):
        chat.encode(conversation("a", "b!"), tok)


def test_the_fingerprint_has_a_template_of_the_tokenizers_own():
    tok = made("qwen2")
    prints = set()
    for template in (templates.CHATML, templates.QWEN2, chat.TEMPLATE):
        tok.chat_template = template
        prints.add(fingerprints.of_tokenizer(tok))
    assert len(prints) == 3
    tok.chat_template = None
    assert fingerprints.of_tokenizer(tok) in prints
