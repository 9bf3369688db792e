#!/bin/sh
# Starts MLflow's server behind a password, with runs and users in PostgreSQL. The passwords come from the environment
# and stand in no command line, which every process of a machine may read.
set -eu
umask 077
python3 - <<'PYTHON'
import os
from urllib.parse import quote

login = f"mlflow:{quote(os.environ['POSTGRES_PASSWORD'], safe='')}@{os.environ['POSTGRES_HOST']}"
with open("/tmp/mlflow-auth.ini", "w") as file:
    # Who has no rights of their own sees nothing; % is the file's own escape.
    file.write("[mlflow]\ndefault_permission = NO_PERMISSIONS\nadmin_username = admin\n")
    file.write(f"database_uri = postgresql+psycopg2://{login.replace('%', '%%')}/mlflow_users\n")
with open("/tmp/mlflow-uri", "w") as file:
    file.write(f"postgresql+psycopg2://{login}/mlflow")

# The users have a database of their own: MLflow's two schemas each keep their version in a table of one name.
import psycopg2

connection = psycopg2.connect(f"postgresql://{login}/mlflow")
connection.autocommit = True
with connection.cursor() as cursor:
    cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'mlflow_users'")
    if cursor.fetchone() is None:
        cursor.execute("CREATE DATABASE mlflow_users")
PYTHON
MLFLOW_AUTH_CONFIG_PATH=/tmp/mlflow-auth.ini
MLFLOW_BACKEND_STORE_URI=$(cat /tmp/mlflow-uri)
export MLFLOW_AUTH_CONFIG_PATH MLFLOW_BACKEND_STORE_URI
unset POSTGRES_PASSWORD
exec mlflow server --host 0.0.0.0 --port 5000 --app-name basic-auth --serve-artifacts --workers 2 "$@"
