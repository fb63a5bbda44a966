"""Where labels come from: a judge, a critic that revises, hindsight."""
