"""InfographicVQA (arXiv 2104.12756) in its challenge's format: infographicsVQA_val_v1.0_withQT.json and the pictures in
infographicsvqa_images/.

The paper's scores are those of the test questions, whose answers only the challenge's server knows.
"""

from internvl_megatron.evaluate.benchmarks.benchmark import Benchmark
from internvl_megatron.evaluate.benchmarks.document_questions import read_documents, score_documents

BENCHMARK = Benchmark(
    name="infovqa",
    title="InfoVQA",
    read=lambda folder, _options: read_documents(
        folder / "infographicsVQA_val_v1.0_withQT.json",
        "image_local_name",
        folder / "infographicsvqa_images",
        label="answer_type",
    ),
    score=score_documents,
    max_tiles=24,
)
