"""Style filter: instructions that state a style or format, and instructions that do not."""

import pytest

from train.multifaceted.collection.style_filter import find_style_statements

STATED = [
    ("length", "Explain gravity in 3 bullet points.", "in 3 bullet points"),
    ("length", "Summarize the plot of Hamlet in under 100 words.", "in under 100 words"),
    ("length", "Write a 500-word essay on bees.", "Write a 500-word"),
    ("length", "What is inflation? Answer in one or two sentences.", "in one or two sentences"),
    ("length", "Briefly describe the water cycle.", "Briefly describe"),
    ("length", "How do vaccines work? Explain in detail.", "Explain in detail"),
    ("length", "Please give me a short summary of the French Revolution.", "Please give me a short summary"),
    ("length", "Tell me about Mars. Keep it short.", "Keep it short"),
    ("length", "Describe a sunset. Your answer should be at most fifty words.", "Your answer should be at most"),
    ("format", "Describe the sea as a poem.", "Describe the sea as a poem"),
    ("format", "List the planets in a table.", "List the planets in a table"),
    ("format", "Give me three countries in JSON.", "Give me three countries in JSON"),
    ("format", "Explain step by step how to change a tyre.", "Explain step by step"),
    ("format", "Is water wet? Answer yes or no.", "Answer yes or no"),
    ("format", "Translate this. Only output the translation.", "Only output"),
    ("format", "Compare cats and dogs. Use bullet points.", "Use bullet points"),
    ("format", "Name a river in the following format: NAME (LENGTH)", "in the following format"),
    ("style", "Tell me about pirates in the style of Hemingway.", "in the style of"),
    ("style", "Explain blockchain in simple terms.", "Explain blockchain in simple terms"),
    ("style", "Write a formal letter to my landlord.", "Write a formal letter"),
    ("style", "Rewrite this paragraph in a friendlier tone.", "in a friendlier tone"),
    ("style", "Tell me the news, but make it funny.", "but make it funny"),
    ("style", "Answer like a pirate: where is Peru?", "Answer like a"),
    ("audience", "Explain like I'm five: why is the sky blue?", "like I'm"),
    ("audience", "ELI5 quantum computing", "ELI5"),
    ("audience", "Explain photosynthesis to a 10-year-old.", "Explain photosynthesis to a 10-year-old"),
    ("audience", "Write a guide to chess for a beginner.", "guide to chess for a beginner"),
    ("audience", "Write about taxes so that a child can understand.", "so that a child can"),
    ("audience", "I'm new to tennis. How are points counted?", "I'm new to"),
    ("role", "Act as a travel agent and plan my week in Rome.", "Act as a"),
    ("role", "Pretend you are Napoleon. Why did you lose?", "Pretend you are"),
    ("role", "You are an experienced chef. What is a roux?", "You are an experienced chef"),
    ("role", "Argue for tariffs from the perspective of a steel worker.", "from the perspective of a"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "instruction", "words"), STATED, ids=[text for _, text, _ in STATED])
def test_statements_that_are_found(kind: str, instruction: str, words: str) -> None:
    statements = find_style_statements(instruction)
    assert (kind, words.casefold()) in [(statement.kind, statement.words.casefold()) for statement in statements]
    without = tuple(
        other_kind for other_kind in ("length", "format", "style", "audience", "role") if other_kind != kind
    )
    assert kind not in {statement.kind for statement in find_style_statements(instruction, without)}


NOT_STATED = [
    "What is a poem?",
    "Write a poem about autumn.",
    "Write a short story about a lighthouse keeper.",
    "How many words are there in the Bible?",
    "How do I create a pivot table in Excel?",
    "In a table tennis match, who serves first?",
    "Emily can type 60 words per minute. How many hours does it take her to write 10,800 words?",
    "A doctor needs to give medicine to a child. The child weighs 30 kilograms. How much is it?",
    "Yvonne had to write a 400-word story and wrote 50 words each day. How many days did it take?",
    "35% of the books are intended for children and 104 of them are for adults. How many books are there?",
    "What are some benefits of playing video games for children and teenagers?",
    "Translate the following sentence into French.",
    "Convert this CSV file to JSON.",
    "Parse the data in JSON format that the server returns.",
    "What are the main elements of the Baroque style?",
    "What role does dopamine play in the brain?",
    "Catalysts act as a bridge between reactants. Which ones are metals?",
    "What is the tone of this passage?",
    "Can you explain how a neural network works?",
    "Which apple is left on the table?",
    "Liam is teaching art to a group of 10 students. How many kits does he need?",
    "You are given two jugs of 3 and 5 litres. How do you measure 4?",
    "Give me some smart casual outfit ideas for a dinner date.",
    "Write a function that returns the words of a text as a list.",
    'Find the error: "He asked me to answer in one word and in a formal tone."',
    "```\nprint('Answer in one word.')\n```\nWhat does this print?",
    "Design a detailed response and recovery plan for a city hit by a hurricane.",
    "Recommend a language learning device specifically designed for children.",
    "Calvin has to thoroughly explain tides in his class. What should he begin with?",
    "Simon is to speak at a conference, and realizes that the audience will also include officials. How does he feel?",
    "Explique la photosynthèse.",
]


@pytest.mark.parametrize("instruction", NOT_STATED)
def test_instructions_without_a_statement(instruction: str) -> None:
    assert find_style_statements(instruction) == []


def test_several_kinds_are_found_once_each_and_long_statements_are_cut() -> None:
    statements = find_style_statements(
        f"Act as a pirate. Explain {'very ' * 20}thoroughly, in 50 words, in a formal tone, in the style of Homer."
    )
    assert [statement.kind for statement in statements] == ["length", "style", "style", "role"]
    assert all(len(statement.words) <= 123 for statement in statements)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["write a very ", "please ", "in a ", "a", "as if "])
def test_no_text_makes_the_patterns_run_forever(text: str) -> None:
    assert find_style_statements(text * (60_000 // len(text))) == []


def test_the_beginning_and_the_end_of_a_long_instruction_are_searched() -> None:
    material = "The sea was calm that day. " * 1_000
    assert find_style_statements(material) == []
    assert [statement.words for statement in find_style_statements(f"{material}\nAnswer in one word.")] == [
        "in one word"
    ]
    assert [statement.words for statement in find_style_statements(f"Act as a critic.\n{material}")] == ["Act as a"]
