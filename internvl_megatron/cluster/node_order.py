"""Which node gets which ranks, so that ranks that talk most have the fewest switches between them.

    python -m internvl_megatron.cluster.node_order RECIPE ADDRESSES NEAR GPUS_PER_NODE [section.field=value ...]

writes hosts in the order of their ranks, a line each. RECIPE, a config.json too, and the settings are what `train` gets. ADDRESSES has a
line for every node: its name, and where it is in the network as SLURM says it (SLURM_TOPOLOGY_ADDR, outermost switch first:
`core.leaf3.n17`; without a topology plug-in the node's name). Tensor-parallel ranks share a node either way.
"""

import re
import sys
from pathlib import Path
from typing import Literal

from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import named_config
from internvl_megatron.errors import ConfigError, UserError
from internvl_megatron.parallel.layout import Layout

Near = Literal["data", "pipeline"]
"""Neighbours on the same switches: nodes of one pipeline stage, which reduce gradients; or the stages of one replica."""


def node_order(addresses: dict[str, str], layout: Layout, gpus_per_node: int, near: Near) -> list[str]:
    """Names of nodes in the order of the ranks they get.

    Nodes are taken switch by switch. Ranks are numbered stage by stage, so in this order the replicas of a stage are neighbours;
    for `pipeline` the nodes' places are passed replica by replica instead.
    """
    sorted_nodes = sorted(addresses, key=lambda name: _natural(addresses[name]))
    first_ranks = range(0, layout.world_size, gpus_per_node)
    assert len(first_ranks) == len(addresses), (
        f"{len(addresses)} nodes of {gpus_per_node} for {layout.world_size} ranks"
    )
    if near == "pipeline":
        first_ranks = sorted(first_ranks, key=lambda rank: (layout.replica(rank), layout.stage(rank), rank))
    at = dict(zip(first_ranks, sorted_nodes, strict=True))
    return [at[rank] for rank in sorted(at)]


def _natural(address: str) -> list[tuple[int, int | str]]:
    """Numbers in a name by their value: leaf2 before leaf10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.findall(r"\d+|\D+", address)]


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0 or 2 (the user can mend it)."""
    recipe, addresses_path, near, gpus_per_node, *overrides = arguments
    try:
        addresses = dict(line.split() for line in Path(addresses_path).read_text().splitlines())
        if near not in ("data", "pipeline"):
            raise ConfigError(f"NODE_ORDER={near} (--node-order): data or pipeline")
        num_ranks = len(addresses) * int(gpus_per_node)
        layout = plan(named_config(recipe, num_ranks, overrides), num_ranks).layout
        sys.stdout.write("\n".join(node_order(addresses, layout, int(gpus_per_node), near)) + "\n")
    except UserError as error:
        sys.stderr.write(f"node_order: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
