"""The weight client alone: follow a learner's versions, verified, into your own model.

python examples/library/weights.py http://127.0.0.1:8000 weight-cache
"""

import asyncio
import sys
from pathlib import Path

from aspo.weights.client import Mirror, WeightClient


async def follow(url: str, cache: Path) -> None:
    async with WeightClient(url, cache, token=None) as client:
        mirror = Mirror(client)
        while (plan := await client.latest(have=mirror.version, wait_s=1)) is not None:
            await mirror.follow(plan)  # then: model.load_state_dict(mirror.state.tensors, strict=False)
            print(
                f"{mirror.version}: {plan.kind} of {plan.size:,} bytes, {len(mirror.state.tensors)} tensors"
            )


asyncio.run(follow(sys.argv[1], Path(sys.argv[2])))
