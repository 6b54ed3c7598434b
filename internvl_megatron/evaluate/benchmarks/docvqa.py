"""DocVQA (arXiv 2007.00398), task 1, in its challenge's format: val_v1.0_withQT.json and the pictures in documents/.

The paper's scores are those of the test questions, whose answers only the challenge's server knows.
"""

from internvl_megatron.evaluate.benchmarks.benchmark import Benchmark
from internvl_megatron.evaluate.benchmarks.document_questions import read_documents, score_documents

BENCHMARK = Benchmark(
    name="docvqa",
    title="DocVQA",
    read=lambda folder, _options: read_documents(
        folder / "val_v1.0_withQT.json", "image", folder, label="question_types"
    ),
    score=score_documents,
    max_tiles=18,
)
