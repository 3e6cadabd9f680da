"""A relay: follows a learner's weights and serves them on, so that many actors cost the learner one.

    await Relay("http://learner:8000", Path("relay"), auth, HttpConfig(host="0.0.0.0", port=8002)).run()

Actors name the relay as their `actor.learner_url`, and a relay may follow another. It answers the same
weight routes from a store of its own, and only with what it has verified.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from pathlib import Path

from prometheus_client import CollectorRegistry

from aspo.config import AuthConfig, HttpConfig
from aspo.http import bind, create_app, reachable
from aspo.schemas import PolicyVersion
from aspo.weights.adapters import base_of
from aspo.weights.client import VersionGone, WeightClient
from aspo.weights.leases import Leases
from aspo.weights.manifest import BlobRef, Manifest, Plan, Transfer, WeightsError
from aspo.weights.server import blob_routes, weight_routes
from aspo.weights.store import WeightStore

log = logging.getLogger(__name__)
_LONG_POLL_S = 20.0
_RETRY_S = 1.0
_REFRESH_EVERY = 16  # versions after which a newcomer's way is asked for anew


class Relay:
    """One relay process; `run` returns after SIGTERM or SIGINT."""

    def __init__(
        self,
        learner_url: str,
        folder: Path,
        auth: AuthConfig,
        http: HttpConfig,
        *,
        advertise_url: str | None = None,
    ) -> None:
        self._url, self._auth, self._advertised = learner_url, auth, advertise_url
        self.place = bind(http, auth)
        self._leases = Leases()
        self._store = WeightStore(folder, leased=self._leases.versions)
        self._since_refresh = 0
        # That of adapters, which is large: not verified for every version.
        self._base: tuple[BlobRef, ...] = ()
        self._reason: str | None = "nothing fetched yet"
        self.app = create_app("relay", auth=auth, ready=lambda: self._reason, registry=CollectorRegistry())
        self.app.include_router(weight_routes(self._store, self._leases))
        self.app.include_router(blob_routes(self._store.blobs))

    async def run(self) -> None:
        """Serve and follow until told to stop."""
        stop = asyncio.Event()
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, stop.set)
        token = self._auth.actor_token.get_secret_value() if self._auth.actor_token else None
        with self.place.serve(self.app) as server:
            log.info("relay of %s serves on %s", self._url, server.url)
            name = f"relay-{socket.gethostname()}-{self.place.listener.getsockname()[1]}"
            serves = self._advertised or reachable(server.url)
            client = WeightClient(
                self._url, self._store.blobs.folder, token=token, name=name, serves=serves, role="relay"
            )
            async with client:
                following = asyncio.create_task(self._follow(client))
                stopping = asyncio.create_task(stop.wait())
                await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                if following.done():
                    following.result()  # it only ends by a fault
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    async def _follow(self, client: WeightClient) -> None:
        while True:
            live = self._store.live()
            try:
                plan = await client.latest(have=str(live) if live else None, wait_s=_LONG_POLL_S)
                if plan is not None:
                    await self._adopt(client, plan)
                self._reason = None
            except VersionGone:
                await asyncio.sleep(_RETRY_S / 10)
            except WeightsError as error:
                self._reason = self._reason or "the learner does not answer"
                log.warning("relay: %s; still serving %s", error, live)
                await asyncio.sleep(_RETRY_S)

    async def _adopt(self, client: WeightClient, plan: Plan) -> None:
        """Fetch all that a plan names and serve it; now and then also what a newcomer would need."""
        self._since_refresh += 1
        await self._take(client, plan)
        self._store.promote(plan.manifest.policy_version)
        if self._since_refresh >= _REFRESH_EVERY:
            self._since_refresh, self._base = 0, ()
            await self._take(client, await client.plan(plan.manifest.version))
        await asyncio.to_thread(self._store.collect)

    async def _take(self, client: WeightClient, plan: Plan) -> None:
        manifests: dict[str, Manifest] = {plan.manifest.version: plan.manifest}
        for transfer in plan.transfers:
            if transfer.version not in manifests:
                manifests[transfer.version] = await client.manifest(transfer.version)
        await client.fetch([ref for ref in _refs(plan, manifests) if ref not in self._base], plan.peers)
        self._base = base_of(plan.manifest)
        by_version: dict[str, list[Transfer]] = {}
        for transfer in plan.transfers:
            by_version.setdefault(transfer.version, []).append(transfer)
        for version in sorted(by_version, key=PolicyVersion.parse):
            await asyncio.to_thread(self._store.adopt, manifests[version], by_version[version])


def _refs(plan: Plan, manifests: dict[str, Manifest]) -> list[BlobRef]:
    refs = [ref for transfer in plan.transfers for ref in transfer.blobs]
    return refs + [ref for manifest in manifests.values() for ref in manifest.files.values()]
