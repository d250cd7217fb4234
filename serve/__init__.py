"""A server of one bundle that speaks OpenAI's protocol; needs the extra `serve`, and no compiler.

The event loop (serve/app.py) reads requests and writes answers; one thread (serve/engine.py) owns the engine.
"""
