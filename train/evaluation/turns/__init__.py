"""Conversations of several turns: does the system message hold to the end?"""
