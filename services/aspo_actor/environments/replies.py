"""From an environment's reply to the tokens between two turns of the model.

Nothing that was said is tokenised again: the next prompt is the tokens so far and these, encoded alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aspo.config import ConfigError, DataConfig
from aspo_actor.environments import Message

_SAID = "aspo-the-model-said-this"


class Replies:
    """Encodes replies; with a chat template, all that it puts between the end of an answer and the next."""

    def __init__(self, tokenizer: Any, data: DataConfig, role: str) -> None:
        self._tokenizer, self._role, self._options = tokenizer, role, data.chat_template_options
        templated = bool(tokenizer.chat_template) if data.chat_template is None else data.chat_template
        self._templated = templated
        if templated and _SAID not in self._render([{"role": role, "content": "yes"}]):
            raise ConfigError(
                "the chat template does not show what the model said before, so an environment cannot reply; "
                "use another template, or data.chat_template = false"
            )

    def encode(self, reply: str | Sequence[Message]) -> list[int]:
        """The token ids of a reply; raises ValueError for messages where there is no chat template."""
        if not self._templated and not isinstance(reply, str):
            raise ValueError("an environment's messages need a chat template; reply with a text")
        text = reply if isinstance(reply, str) else ""
        if self._templated:
            messages = [{"role": self._role, "content": reply}] if isinstance(reply, str) else reply
            rest = self._render(messages).partition(_SAID)[2]
            # The model has drawn the token that ends its turn.
            text = rest.removeprefix(self._tokenizer.eos_token or "")
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Sequence[Message]) -> str:
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
        text: str = self._tokenizer.apply_chat_template(
            [*before, *messages], add_generation_prompt=True, tokenize=False, **self._options
        )
        return text
