"""Numbers, words and the rest of a vocabulary; and a loop of time stamps in a real answer's tokens."""

import afnext
from afnext.runtime.app.token_kinds import token_kinds
from afnext.runtime.engine.repetition import NUMBER, OTHER, WORD, RepetitionGuard


def test_every_token_has_the_kind_of_its_text(model: afnext.Model) -> None:
    tokenizer = model.tokenizer
    kinds = token_kinds(tokenizer)
    added = set(tokenizer.added_tokens.values())
    assert len(kinds) == tokenizer.vocab_size
    seen = set()
    for token, kind in enumerate(kinds.tolist()):
        data = b"" if token in added else tokenizer.token_bytes(token)
        if data.removeprefix(b" ").isdigit():
            expected = NUMBER
        elif any(byte >= 0x80 or chr(byte).isalpha() for byte in data):
            expected = WORD
        else:
            expected = OTHER
        assert kind == expected, data
        seen.add(kind)
    assert seen == {NUMBER, WORD, OTHER}


def test_a_transcript_in_a_loop_is_found(model: afnext.Model) -> None:
    lines = [f"[{second // 60:02}:{second % 60:02}] Thank you.\n" for second in range(50, 75)]
    guard = RepetitionGuard(token_kinds(model.tokenizer))
    for token in model.tokenizer.encode("".join(lines)):
        guard.push(token)
    assert guard.found is not None
    assert (guard.found.start, guard.found.repeats) == (0, len(lines))
    assert guard.found.period == len(model.tokenizer.encode(lines[-1]))
