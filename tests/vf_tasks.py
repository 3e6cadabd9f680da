"""Environments as users of `verifiers` write them: a single turn, a game of several, a tool."""

from __future__ import annotations

from typing import Any


def load_environment(kind: str = "single", tricks: bool = False) -> Any:
    import datasets
    import verifiers as vf

    rows = [
        {"question": "6*7?", "answer": "42", "info": {"hint": "even"}},
        {"question": "2*3?", "answer": "6"},
    ]
    dataset = datasets.Dataset.from_list([{"info": {"hint": ""}} | row for row in rows])

    def right(completion: Any, answer: str) -> float:
        return float(answer in completion[-1]["content"])

    async def short(completion: Any, state: Any, **kwargs: Any) -> float:
        return float(len(state["trajectory"]) < 3)

    def hinted(info: Any) -> float:
        return float(info["hint"] == "even")

    rubric = vf.Rubric(funcs=[right, short, hinted], weights=[1.0, 0.25, 0.125])
    common = {"dataset": dataset, "rubric": rubric, "system_prompt": "Be brief."}

    class Game(vf.MultiTurnEnv):
        async def setup_state(self, state: Any) -> Any:
            state["wrong"] = object() if tricks else 0
            return state

        @vf.stop
        async def solved(self, state: Any) -> bool:
            return (
                bool(state["trajectory"])
                and state["answer"] in state["trajectory"][-1]["completion"][-1]["content"]
            )

        async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
            state["wrong"] += 1
            reply = [{"role": "user", "content": f"No, that is wrong ({state['wrong']})."}]
            if state["wrong"] == 3:
                state["final_env_response"] = reply
            return reply

    def multiply(a: int, b: int) -> int:
        """Multiply two numbers."""
        return a * b

    if kind == "tool":
        return vf.ToolEnv(tools=[multiply], max_turns=5, **common)
    return Game(max_turns=9, **common) if kind == "game" else vf.SingleTurnEnv(**common)
