"""distilabel 1.5.3 with SYSGEN's four calls, for `benchmark.py sysgen`; run by the Python that has distilabel.

    python scripts/benchmarks/sysgen_distilabel.py '{"base_url": "http://127.0.0.1:8000/v1", ...}'

A pipeline of four tasks, each a `Task` as distilabel's guide to custom tasks has it, with our prompts and our tag
parser. A task sends a batch of `input_batch_size` requests at once and waits for all of them before the next batch; the
tasks run at the same time, each in its process. Optional work is off: raw inputs and outputs aren't stored, and the log
is silent. The cache can't be disabled (`use_cache=False` only ignores it), nor can our journal.

The tasks share the server's slots through 429 responses. Of batches of 16, 64 and 128 rows, and of 32 with two replicas
of each task, 64 was the fastest; `load_groups="sequential_step_execution"` hung after the first step.
"""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `train`, which is not installed where distilabel is

from distilabel.models import OpenAILLM  # type: ignore[import-not-found]
from distilabel.pipeline import Pipeline  # type: ignore[import-not-found]
from distilabel.steps import LoadDataFromFileSystem  # type: ignore[import-not-found]
from distilabel.steps.tasks import Task  # type: ignore[import-not-found]

from train.llm.yes_or_no import says_no
from train.sysgen import prompts
from train.sysgen.tags import parse, parse_verdicts

Row = dict[str, Any]
Messages = list[dict[str, str]]


class SysgenTask(Task):
    """Task with the columns that it reads and the one that it adds."""

    reads: ClassVar[list[str]]
    adds: ClassVar[str]

    @property
    def inputs(self) -> list[str]:
        """Return the columns that the task reads."""
        return self.reads

    @property
    def outputs(self) -> list[str]:
        """Return the columns that the task adds."""
        return [self.adds]

    def format_output(self, output: str | None, input: Row) -> Row:
        """Return the new column of a row, None after a failed request."""
        return {self.adds: None if output is None else self.read_answer(output, input)}

    def read_answer(self, answer: str, row: Row) -> Any:
        """Return the value of the new column."""
        return answer


class Generate(SysgenTask):
    """Task that writes a system message in tagged phrases, and filters it."""

    reads: ClassVar = ["messages"]
    adds: ClassVar = "annotated"

    def format_input(self, input: Row) -> Messages:
        """Return the prompt."""
        return prompts.generate(input["messages"])

    def read_answer(self, answer: str, row: Row) -> str:
        """Return the filtered message with its tags."""
        return parse(answer).render()


class Verify(SysgenTask):
    """Task that judges each tag, and drops those that are Bad or None."""

    reads: ClassVar = ["annotated"]
    adds: ClassVar = "system"

    def format_input(self, input: Row) -> Messages:
        """Return the prompt."""
        return prompts.verify(parse(input["annotated"]))

    def read_answer(self, answer: str, row: Row) -> str:
        """Return the text of the tags that are Good."""
        bad = {tag for tag, verdict in parse_verdicts(answer).of.items() if verdict != "Good"}
        return parse(row["annotated"]).without(bad, "judged").text


class Answer(SysgenTask):
    """Task that answers the question under the system message."""

    reads: ClassVar = ["messages", "system"]
    adds: ClassVar = "new_answer"

    def format_input(self, input: Row) -> Messages:
        """Return the conversation."""
        question = input["messages"][0]["content"]
        return [{"role": "system", "content": input["system"]}, {"role": "user", "content": question}]


class Judge(SysgenTask):
    """Task that judges if the answer follows the system message."""

    reads: ClassVar = ["messages", "system", "new_answer"]
    adds: ClassVar = "ignores"

    def format_input(self, input: Row) -> Messages:
        """Return the prompt."""
        return prompts.judge(input["system"], input["messages"][0]["content"], input["new_answer"])

    def read_answer(self, answer: str, row: Row) -> bool | None:
        """Return whether the verdict is No."""
        return says_no(answer)


STAGES = ((Generate, 512, 0.7), (Verify, 256, 0.7), (Answer, 1_024, 0.7), (Judge, 16, 0.0))


def main() -> None:
    """Run the pipeline, and write the number of complete rows."""
    task = json.loads(sys.argv[1])
    with Pipeline(name="sysgen", cache_dir=Path(task["folder"], "cache")) as pipeline:
        # From a file: Python objects would be written into the pipeline's description again with every batch.
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
