"""Write system_ifeval.jsonl and system_ifeval_user.jsonl: tasks with constraints that IFEval's checkers verify.

    python recipes/smollm2-135m/data/build_system_ifeval.py [--output FOLDER]

The format is S-IFEval's: constraints in the system message and the task in the user turn, and as a control the same
text completely in the user turn. Tasks and wordings are ours (Apache-2.0); rule names and arguments are those of
lm_eval.tasks.ifeval. Each of the 50 tasks has 3 rules, and some rows have a second constraint that is compatible with
the first. The output is reproducible to the byte.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS_PER_TASK = 3

TASKS = """\
Describe a lighthouse to someone who has never seen the sea.
Explain why leaves change their colour in autumn.
Write a short note that thanks a neighbour for watering the plants.
Tell me how to make a simple vegetable soup.
Suggest a plan for a rainy Sunday with two small children.
Explain what a library card is good for.
Write a product text for a wooden pencil box.
Describe how a bicycle brake works.
Give advice to someone who starts to learn the piano at fifty.
Write a short story about a lost umbrella.
Explain the difference between a lake and a pond.
Describe the smell of a bakery in the early morning.
Write an invitation to a street party in June.
Tell me what to pack for a three-day hike in the hills.
Explain how bees find their way home.
Write a complaint about a train that was two hours late.
Describe a chess board to somebody on the telephone.
Give reasons for learning a second language.
Write a weather report for a town on the coast.
Explain how to sharpen a kitchen knife safely.
Describe the first day at a new job.
Write a review of a small museum about clocks.
Tell me how rain is made.
Suggest names for a shop that repairs radios, and say why they fit.
Explain to a child why the moon seems to change its shape.
Write a message to colleagues about a broken coffee machine.
Describe what you would see on a walk along a canal.
Give tips for keeping a notebook of ideas.
Write a toast for the retirement of a school gardener.
Explain what a compass shows and what it can't show.
Describe a market hall just before it opens.
Tell me how to look after a pair of leather boots.
Write a letter from a ship's cook to his sister.
Explain why bread rises.
Give arguments for and against a four-day week.
Describe the sound of an orchestra that tunes its instruments.
Write instructions for planting tulips.
Explain how a thermos flask keeps tea warm.
Write a job advertisement for a bookbinder.
Tell me about the life of a hedgehog through the year.
Describe an old map that hangs in a hallway.
Suggest three ways to save water at home.
Write the opening of a detective story set in a greenhouse.
Explain what makes a good question.
Describe how to fold a paper boat.
Write a short speech for the opening of a bridge.
Give a beginner an introduction to watching birds.
Explain why old stone houses stay cool in summer.
Write a postcard from a village in the snow.
Tell me what a clockmaker does all day.
"""

Variant = tuple[str, dict[str, Any]]

RULES: dict[str, list[Variant]] = {
    "change_case:english_capital": [
        ("Write in English and in capital letters only.", {}),
        ("Your whole answer must be in English, with every letter a capital.", {}),
    ],
    "change_case:english_lowercase": [
        ("Answer in English without a single capital letter.", {}),
        ("Use lowercase letters only, in English, from the first word to the last.", {}),
    ],
    "change_case:capital_word_frequency": [
        (
            "Write at least 3 words fully in capital letters.",
            {"capital_frequency": 3, "capital_relation": "at least"},
        ),
        (
            "Fewer than 2 words may be written fully in capital letters.",
            {"capital_frequency": 2, "capital_relation": "less than"},
        ),
    ],
    "combination:two_responses": [
        ("Give two different answers, with nothing but 6 asterisks between them: ******.", {}),
    ],
    "detectable_content:number_placeholders": [
        ("Leave at least 2 placeholders in square brackets, such as [name].", {"num_placeholders": 2}),
        ("Your text must have 3 or more placeholders in square brackets, like [date].", {"num_placeholders": 3}),
    ],
    "detectable_content:postscript": [
        ("Add a postscript at the end that begins with P.S.", {"postscript_marker": "P.S."}),
        ("Close with a postscript that begins with P.P.S", {"postscript_marker": "P.P.S"}),
    ],
    "detectable_format:json_format": [
        ("Your entire output must be valid JSON.", {}),
        ("Answer with a JSON object and nothing beside it.", {}),
    ],
    "detectable_format:multiple_sections": [
        (
            "Write 2 sections. Begin them with Section 1 and Section 2.",
            {"section_spliter": "Section", "num_sections": 2},
        ),
        (
            "Write 3 sections that begin with SECTION 1, SECTION 2 and SECTION 3.",
            {"section_spliter": "SECTION", "num_sections": 3},
        ),
    ],
    "detectable_format:number_bullet_lists": [
        ("Answer with exactly 3 bullet points, each on a line that starts with an asterisk.", {"num_bullets": 3}),
        ("Use exactly 2 Markdown bullet points, like: * a point", {"num_bullets": 2}),
    ],
    "detectable_format:number_highlighted_sections": [
        ("Highlight at least 2 parts of the answer in Markdown, like *this part*.", {"num_highlights": 2}),
        ("Put one part of your answer or more between asterisks, like *this*.", {"num_highlights": 1}),
    ],
    "detectable_format:title": [
        ("Give your answer a title in double angular brackets, like <<a title>>.", {}),
        ("Begin with a title that stands in double angular brackets, such as <<on rivers>>.", {}),
    ],
    "keywords:existence": [
        ("Use the words morning and water.", {"keywords": ["morning", "water"]}),
        ("The word patience must occur.", {"keywords": ["patience"]}),
        ("Work the words window and quiet into your answer.", {"keywords": ["window", "quiet"]}),
    ],
    "keywords:forbidden_words": [
        ("Never use the words very and really.", {"forbidden_words": ["very", "really"]}),
        ("The words good, because and make are forbidden.", {"forbidden_words": ["good", "because", "make"]}),
        ("Avoid the word the.", {"forbidden_words": ["the"]}),
    ],
    "keywords:frequency": [
        (
            "The word time must appear at least 3 times.",
            {"keyword": "time", "frequency": 3, "relation": "at least"},
        ),
        (
            "The word you may appear fewer than 2 times.",
            {"keyword": "you", "frequency": 2, "relation": "less than"},
        ),
    ],
    "keywords:letter_frequency": [
        (
            "The letter z must appear at least 2 times.",
            {"letter": "z", "let_frequency": 2, "let_relation": "at least"},
        ),
        (
            "The letter k may appear fewer than 3 times.",
            {"letter": "k", "let_frequency": 3, "let_relation": "less than"},
        ),
    ],
    "length_constraints:nth_paragraph_first_word": [
        (
            "Write 2 paragraphs, parted by an empty line; the second begins with the word however.",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "however"},
        ),
        (
            "Write 3 paragraphs with empty lines between them, the first of which begins with the word listen.",
            {"num_paragraphs": 3, "nth_paragraph": 1, "first_word": "listen"},
        ),
    ],
    "length_constraints:number_paragraphs": [
        ("Write exactly 2 paragraphs, parted by the Markdown divider ***", {"num_paragraphs": 2}),
        ("Your answer has 3 paragraphs with the Markdown divider *** between them.", {"num_paragraphs": 3}),
    ],
    "length_constraints:number_sentences": [
        ("Use fewer than 4 sentences.", {"num_sentences": 4, "relation": "less than"}),
        ("Write at least 5 sentences.", {"num_sentences": 5, "relation": "at least"}),
    ],
    "length_constraints:number_words": [
        ("Stay below 40 words.", {"num_words": 40, "relation": "less than"}),
        ("Write at least 80 words.", {"num_words": 80, "relation": "at least"}),
    ],
    "punctuation:no_comma": [
        ("Use no commas.", {}),
        ("Write without any comma.", {}),
    ],
    "startend:end_checker": [
        ("End with exactly these words: That is all I know.", {"end_phrase": "That is all I know."}),
        ("Your last words must be: Ask me again tomorrow.", {"end_phrase": "Ask me again tomorrow."}),
    ],
    "startend:quotation": [
        ("Put your whole answer between double quotation marks.", {}),
        ('Begin and end the answer with the character ".', {}),
    ],
}

SECOND = ("punctuation:no_comma", "keywords:existence", "detectable_format:title", "keywords:forbidden_words")
"""Rules that are compatible with all of TAKES_A_SECOND."""

TAKES_A_SECOND = (
    "detectable_content:number_placeholders",
    "detectable_content:postscript",
    "detectable_format:number_bullet_lists",
    "detectable_format:number_highlighted_sections",
    "length_constraints:number_paragraphs",
    "length_constraints:number_sentences",
    "length_constraints:number_words",
    "startend:end_checker",
    "change_case:english_lowercase",
)


def build(seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return the rows by file name. Rules are dealt from a deck that is reshuffled when it runs out."""
    rng = random.Random(seed)
    deck: list[str] = []
    turns = dict.fromkeys(RULES, 0)

    def next_variant(rule: str) -> Variant:
        turns[rule] += 1
        return RULES[rule][turns[rule] % len(RULES[rule])]

    system, user = [], []
    for number, task in enumerate(TASKS.splitlines()):
        hand: list[str] = []
        while len(hand) < ROWS_PER_TASK:
            if not deck:
                deck = rng.sample(sorted(RULES), len(RULES))
            hand.append(deck.pop())
        for position, rule in enumerate(hand):
            rules = [rule]
            if rule in TAKES_A_SECOND and rng.random() < 0.8:
                rules.append(rng.choice(SECOND))
            texts, arguments = zip(*map(next_variant, rules), strict=True)
            constraints = " ".join(texts)
            row = {
                "key": 1_000 * (number + 1) + position,
                "prompt": f"{task} {constraints}",
                "instruction_id_list": rules,
                "kwargs": list(arguments),
            }
            turn = {"role": "user", "content": task}
            system.append(row | {"messages": [{"role": "system", "content": constraints}, turn]})
            user.append(row | {"messages": [{"role": "user", "content": f"{constraints}\n\n{task}"}]})
    return {"system_ifeval.jsonl": system, "system_ifeval_user.jsonl": user}


def main() -> None:
    """Write both files and print their numbers of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="output folder (default: that of this script)")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in build().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{folder / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
