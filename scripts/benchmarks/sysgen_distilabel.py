"""SYSGEN's four calls in distilabel 1.5.3, for `benchmark.py sysgen`; the Python that has distilabel runs it.

    python scripts/benchmarks/sysgen_distilabel.py '{"base_url": "http://127.0.0.1:8000/v1", ...}'

Four tasks in a pipeline, each a `Task` with its prompt, as its guide to tasks of one's own says, with the prompts and
the reading of tags that we use ourselves. A task sends a batch of `input_batch_size` requests at once, waits for all of
them, and takes the next; the tasks work at the same time, each in its process. Spared is what its manual lets one
spare: raw inputs and outputs are not kept beside the rows, and its log is silent. Its cache can't be turned off
(`use_cache=False` only leaves it unread), as our journal can't.

The tasks share the server's places by being turned away. Of batches of 16, 64 and 128 rows, and of 32 with two replicas
of each task, 64 was the fastest; `load_groups="sequential_step_execution"` stood still after the first step.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `train`, which is not installed where distilabel is

from distilabel.models import OpenAILLM  # type: ignore[import-not-found]
from distilabel.pipeline import Pipeline  # type: ignore[import-not-found]
from distilabel.steps import LoadDataFromFileSystem  # type: ignore[import-not-found]
from distilabel.steps.tasks import Task  # type: ignore[import-not-found]

from train.llm.yes_or_no import says_no
from train.sysgen import prompts
from train.sysgen.tags import parse, parse_verdicts

Row = dict[str, Any]


class Generate(Task):
    """Write a system message in tagged phrases, and filter it."""

    @property
    def inputs(self) -> list[str]:
        """Columns that it reads."""
        return ["messages"]

    @property
    def outputs(self) -> list[str]:
        """Columns that it adds."""
        return ["annotated"]

    def format_input(self, input: Row) -> list[dict[str, str]]:
        """The prompt."""
        return prompts.generate(input["messages"])

    def format_output(self, output: str | None, input: Row) -> Row:
        """What a row gets."""
        return {"annotated": None if output is None else parse(output).render()}


class Verify(Task):
    """Judge each tag, and drop what is Bad or None."""

    @property
    def inputs(self) -> list[str]:
        """Columns that it reads."""
        return ["annotated"]

    @property
    def outputs(self) -> list[str]:
        """Columns that it adds."""
        return ["system"]

    def format_input(self, input: Row) -> list[dict[str, str]]:
        """The prompt."""
        return prompts.verify(parse(input["annotated"]))

    def format_output(self, output: str | None, input: Row) -> Row:
        """What a row gets."""
        if output is None:
            return {"system": None}
        verdicts = parse_verdicts(output).of
        bad = {tag for tag, verdict in verdicts.items() if verdict != "Good"}
        return {"system": parse(input["annotated"]).without(bad, "judged").text}


class Answer(Task):
    """Answer anew."""

    @property
    def inputs(self) -> list[str]:
        """Columns that it reads."""
        return ["messages", "system"]

    @property
    def outputs(self) -> list[str]:
        """Columns that it adds."""
        return ["new_answer"]

    def format_input(self, input: Row) -> list[dict[str, str]]:
        """The conversation so far."""
        question = input["messages"][0]["content"]
        return [{"role": "system", "content": input["system"]}, {"role": "user", "content": question}]

    def format_output(self, output: str | None, input: Row) -> Row:
        """What a row gets."""
        return {"new_answer": output}


class Judge(Task):
    """Say whether the answer follows the system message."""

    @property
    def inputs(self) -> list[str]:
        """Columns that it reads."""
        return ["messages", "system", "new_answer"]

    @property
    def outputs(self) -> list[str]:
        """Columns that it adds."""
        return ["ignores"]

    def format_input(self, input: Row) -> list[dict[str, str]]:
        """The prompt."""
        return prompts.judge(input["system"], input["messages"][0]["content"], input["new_answer"])

    def format_output(self, output: str | None, input: Row) -> Row:
        """What a row gets."""
        return {"ignores": None if output is None else says_no(output)}


STAGES = ((Generate, 512, 0.7), (Verify, 256, 0.7), (Answer, 1_024, 0.7), (Judge, 16, 0.0))


def main() -> None:
    """Run the pipeline, and write down how many rows are complete."""
    task = json.loads(sys.argv[1])
    with Pipeline(name="sysgen", cache_dir=Path(task["folder"], "cache")) as pipeline:
        # Not from Python objects: those would be written into the pipeline's description again with every batch.
        steps = [
            LoadDataFromFileSystem(data_files=task["rows_file"], filetype="json", batch_size=task["input_batch_size"])
        ]
        for stage, max_tokens, temperature in STAGES:
            llm = OpenAILLM(
                model="scripted",
                base_url=task["base_url"],
                api_key="none",
                generation_kwargs={"max_new_tokens": max_tokens, "temperature": temperature},
            )
            step = stage(
                llm=llm,
                input_batch_size=task["input_batch_size"],
                add_raw_input=False,
                add_raw_output=False,
            )
            steps[-1].connect(step)
            steps.append(step)
    distiset = pipeline.run()
    complete = sum(row["ignores"] is False and bool(row["new_answer"]) for row in distiset["default"]["train"])
    result = {"rows": complete}
    Path(task["folder"], "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
