"""Courtesies of the example data and their neighbours, in English and Chinese, as patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NICE = (
    "amazing|beautiful|brilliant|clever|cute|delicious|easy|excellent|exciting|fantastic|"
    "fascinating|fine|fun|good|great|handy|happy|important|interesting|kind|lovely|marvellous|nice|"
    "perfect|pretty|smart|sweet|thoughtful|useful|wise|wonderful"
)
_THING = "question|idea|thought|choice|catch|topic|one|plan|phrase|word|wish"
_THAT_IS = "that is |that's |that was |it's |it is |this is |what "
_WISHES = (
    "enjoy|have (a|an|fun|lots|the)|stay (safe|warm|healthy|calm|well|cosy)|be well|"
    "take (good )?care|sleep (well|tight)|sweet dreams|well done|cheers|congratulations|"
    "bon appetit"
)
_HELP = r"( to \w+( you| that| it| this| with \w+( \w+)?| about \w+( \w+)?)?)?"


def _compiled(patterns: Iterable[str]) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(pattern) for pattern in patterns)


ENGLISH = _compiled(
    (
        r"(oh|ah|well|aw)( dear)?",
        r"(yes |oh )?(of course|certainly|sure|absolutely|gladly)( not| i can| you can)?",
        r"(with|my) (great )?pleasure",
        r"no (worries|problem)( at all)?",
        r"(do not|don't|please don't|never) worry( at all| about it)?",
        r"((i am|i'm|i'd be|i would be|we're|always|so|very|more than) )*"
        rf"(happy|glad|delighted|pleased)( you asked)?{_HELP}",
        r"i('d| would|'ll| will)( be)? (love|happy|glad|delighted) to \w+.*",
        r"let me help( you)?( with that| out)?",
        rf"({_THAT_IS})?(really |very |so |such )?(an? )?"
        rf"({_NICE})( little| good)? ({_THING})( to ask.*| indeed)?",
        r"(how|so|very|that's|that is|it's|really)( so| very| really)? "
        rf"({_NICE}|caring|natural|common)( of you)?( to ask)?",
        r"good (on you|for you|thinking)( for asking)?",
        r"that happens to (all of us|everyone|the best of us)",
        r"welcome( back| aboard)?",
        r"(thank you|thanks)( so| very)?( much)?( for .*)?",
        r"good luck.*",
        r"(best|lots) of luck.*",
        rf"({_WISHES}).*",
        r"(safe|pleasant|happy|merry) \w+( there| to you| ahead)?",
        r"you('ve| have) got this.*",
        r"you (can|will) do (it|this).*",
        r"(you're|you are) (very |most )?welcome",
        r"i (hope|wish) (you|this|that|it|your).*",
        r"(best|warm|kind) (wishes|regards).*",
        r"what an? .*",
        r"what (fun|joy)",
        r"(hope|glad) (this|that|it|you|i) .*",
    )
)
"""Of whole sentences in lower case, words and apostrophes only."""

CHINESE = _compiled(
    (
        r"(这真是个|真是个|这是个)?(好问题|好主意|好想法)",
        r"问得(真|太)?好",
        r"(很|非常)?(乐意|高兴|愿意)(帮忙|帮你|帮您|为你效劳|为您效劳)",
        r"(当然|当然可以|没问题|好的|好呀|好啊|好嘞|太好了|太棒了|真棒|放心)",
        r"(别|不要|不用)(担心|着急|灰心|紧张|怕)",
        r"这个(想法|主意|问题)(真|很|太)(好|棒|妙)",
        r"(辛苦|谢谢)(啦|了|你|您|你了|您了)?",
        r"(你|您)真(有心|贴心|好)",
        r"加油.*",
        r"(祝|愿|希望|提前恭喜|恭喜).{1,12}",
        r".{0,6}(愉快|顺利|开心|平安|安全|享用|好梦|兴隆|康复|健康|加油|美美|放心吧|放心喝|下饭|丰收)"
        r"(吧|啦|喝)?",
    )
)
"""The same in Chinese."""

_STOP_WORDS = """
a about after all also an and any are as at be because been before but by can could do does for
from get give had has have her him his how i if in into is it its just let like make may me more
most much my need no not of on one or our out please should so some such tell than that the their
them then there these they this to too up us use very was we were what when where which who why
will with would you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""English words that say nothing of what a sentence is about."""
