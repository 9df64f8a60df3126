"""A model behind HTTP, as OpenAI's clients speak it and in our own form: ``t5-trt serve``. It needs the extra ``serve``.

Request -> its size, time and client are watched (`watch`) -> validated body (`completions`, `generate`) -> token ids and
settings within the limits (`service`) -> ``Engine.submit`` -> handle -> tokens -> text that stays as it is (`text`, `answer`) -> JSON,
or server-sent events. What cannot be answered becomes an error in OpenAI's form (`failures`).
"""
