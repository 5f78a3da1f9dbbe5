"""The closed vocabulary of afnext-tiny: words, sounds, and questions about them."""

_LETTERS = {
    "A": "ay",
    "B": "bee",
    "C": "see",
    "D": "dee",
    "E": "ee",
    "F": "eff",
    "G": "jee",
    "H": "aitch",
    "I": "eye",
    "J": "jay",
    "K": "kay",
    "L": "ell",
    "M": "em",
    "N": "en",
    "O": "oh",
    "P": "pee",
    "Q": "cue",
    "R": "are",
    "S": "ess",
    "T": "tee",
    "U": "you",
    "V": "vee",
    "W": "double you",
    "X": "ex",
    "Y": "why",
    "Z": "zee",
}
_DIGITS = "zero one two three four five six seven eight nine"
_NUMBERS = "ten eleven twelve twenty thirty hundred"
_MONTHS = "January February March April May June July August September October November December"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_COMMANDS = (
    "yes no stop go start left right up down on off open close play pause next back help call send save delete cancel "
    "repeat louder quiet hello goodbye please thanks wait ready"
)
_THINGS = (
    "red green blue yellow black white orange purple dog cat bird house tree water fire music phone door window table"
)

WORDS: dict[str, str] = {
    **_LETTERS,
    **{word: word for word in " ".join((_DIGITS, _NUMBERS, _MONTHS, _DAYS, _COMMANDS, _THINGS)).split()},
}
"""Each word as written, and the spelling that makes speech synthesizers pronounce it."""

SOUNDS = ("beep", "tone", "chirp", "click", "noise", "knock", "siren", "bell", "buzz")
PITCHES = ("low", "medium", "high")
PLURALS = {sound: "buzzes" if sound == "buzz" else f"{sound}s" for sound in SOUNDS}
SINGULARS = {plural: sound for sound, plural in PLURALS.items()}

TRANSCRIBE = ("Transcribe the input speech.", "What words are spoken?", "Write down what is said.")
TRANSCRIBE_TIMES = (
    "Transcribe the input speech with timestamps.",
    "Write down each word with its time.",
    "What words are spoken, and when?",
)
SOUNDS_TIMES = (
    "What sounds occur, and when?",
    "List the sounds with timestamps.",
    "Which sounds do you hear, and at what time?",
)
DESCRIBE = ("Describe the audio with timestamps.", "What happens in this recording, and when?", "What do you hear?")
WHEN_SOUND = ("When does the {} occur?", "At what time is the {}?", "When do you hear a {}?")
WHEN_WORD = ('When is the word "{}" spoken?', 'At what time is "{}" said?')
COUNT_SOUND = ("How many {plural} are there?", "How many {plural} do you hear?", "How often does the {sound} occur?")
COUNT_WORDS = ("How many words are spoken?", "How many words do you hear?")
FIRST = ("What happens first?", "What is the first thing you hear?")
LAST = ("What happens last?", "What is the last thing you hear?")
PITCH = ("Is the tone low, medium or high?", "What pitch does the tone have?")
THINK = " Please think and reason about the input audio before you respond."
