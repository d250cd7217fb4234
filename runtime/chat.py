"""From a conversation to the text that a model was trained on, by the checkpoint's own Jinja template.

Templates are programs of a stranger: they run in Jinja's sandbox, with the few names that transformers gives them
(utils/chat_template_utils.py) and with those of its filters whose results differ from Jinja's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from runtime.bundle import Chat
from specs.errors import SpecRTError, Where

if TYPE_CHECKING:
    from jinja2 import Template


class ChatTemplate:
    """A bundle's chat template; nothing of Jinja is imported before the first one is read."""

    def __init__(self, chat: Chat) -> None:
        """Read and parse it. Raises SpecRTError RUN-051 for one that is no Jinja template."""
        from jinja2 import TemplateSyntaxError

        self._file, self._tokens = str(chat.template), dict(chat.tokens)
        try:
            self._template = _compiled(chat.template.read_text(encoding="utf-8"))
        except (TemplateSyntaxError, OSError, UnicodeDecodeError) as error:
            line = error.lineno if isinstance(error, TemplateSyntaxError) else None
            message = f"the chat template can't be read: {error}"
            hint = "correct the checkpoint's chat template, then compile again"
            raise SpecRTError("RUN-051", message, where=Where(self._file, line), hint=hint) from error

    def render(self, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str:
        """The prompt of a conversation, up to where the model answers.

        Raises SpecRTError RUN-052 where the template refuses the messages, or fails on them.
        """
        given = {"tools": None, "documents": None, "add_generation_prompt": True, **self._tokens, **variables}
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._template.render({**given, "messages": plain})
        except Exception as error:  # a template can raise anything, and says in its error what it expects
            message = f"the chat template refuses these messages: {error}"
            hint = "templates may limit which roles there are and in which order; this one is chat_template.jinja"
            raise SpecRTError("RUN-052", message, where=Where(self._file), hint=hint) from error


def _compiled(text: str) -> Template:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant said, for training: its body is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # Jinja's own escapes what HTML would take for tags
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)
