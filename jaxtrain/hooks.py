"""Method callbacks: functions that run before and after the methods of trainers and factories.

A class names them in `callbacks = [("post-step", fn)]` or as a method `pre_step_callback`. Parents
come first, then the list of a class, then its method. A pre callback gets the arguments of the
method and may return them changed, in the same order; a post callback gets and may change what the
method returned.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from jaxtrain.recipe.errors import did_you_mean

Hook = Callable[..., Any]


class Hooked:
    """A method between its callbacks; everything else is the method's own."""

    def __init__(self, owner: Any, method: Any, pre: list[Hook], post: list[Hook]):
        self.owner, self.method, self.pre, self.post = owner, method, pre, post

    def __call__(self, *args: Any, **named: Any) -> Any:
        for hook in self.pre:
            changed = hook(self.owner, *args, **named)
            if changed is not None:
                args = changed if isinstance(changed, tuple) and len(args) > 1 else (changed,)
        result = self.method(*args, **named)
        for hook in self.post:
            changed = hook(self.owner) if result is None else hook(self.owner, result)
            result = result if changed is None else changed
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)


class HasHooks:
    """A base whose subclasses may name callbacks; `events` maps an event to the method it is
    about."""

    events: ClassVar[dict[str, str]] = {}
    traced_events: ClassVar[tuple[str, ...]] = ()
    """Events inside the jitted functions: their callbacks are pure and run once a compilation."""
    callbacks: ClassVar[list[tuple[str, Hook]]] = []

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for event, _ in own_hooks(cls):
            when, _, what = event.replace("_", "-").partition("-")
            if when not in ("pre", "post") or what not in known_events(cls):
                known = [f"{w}-{e}" for w in ("pre", "post") for e in known_events(cls)]
                raise ValueError(
                    f"{cls.__qualname__}: no event {event!r}{did_you_mean(event, known)} "
                    f"(events: {', '.join(sorted(known_events(cls)))})"
                )

    def hook_methods(self) -> None:
        """Put the callbacks around this object's methods; called once it is made."""
        for event, name in self.events.items():
            method = getattr(self, name)
            if (hooked := self.hooked(event, method)) is not method:
                setattr(self, name, hooked)

    def hooked(self, event: str, method: Any) -> Any:
        """`method` between the callbacks of an event; itself when there are none."""
        pre, post = self.hooks(f"pre-{event}"), self.hooks(f"post-{event}")
        return Hooked(self, method, pre, post) if pre or post else method

    def hooks(self, event: str) -> list[Hook]:
        """Callbacks of one event, in the order in which they run."""
        return [
            hook
            for cls in reversed(type(self).__mro__)
            for name, hook in own_hooks(cls)
            if name.replace("_", "-") == event
        ]


def known_events(cls: type) -> set[str]:
    return {"init", *getattr(cls, "events", {}), *getattr(cls, "traced_events", ())}


def own_hooks(cls: type) -> list[tuple[str, Hook]]:
    """Event and function of every callback that the body of a class names."""
    listed = [(str(event), hook) for event, hook in vars(cls).get("callbacks", [])]
    methods = [
        (name.removesuffix("_callback").replace("_", "-"), function)
        for name, function in vars(cls).items()
        if name.startswith(("pre_", "post_")) and name.endswith("_callback")
        if inspect.isfunction(function)
    ]
    return listed + methods
