#!/bin/sh
# Makes the secrets that compose.yaml reads, in the folder named; those that are there are kept.
#     deploy/compose/secrets.sh [FOLDER [ACL_TEMPLATE]]
# The folder is closed to others. The files in it are readable, for a container's user is nobody of this machine.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/secrets}
template=${2:-$here/../redis/users-7.acl}

password() { od -An -tx1 -N32 /dev/urandom | tr -d ' \n'; }

umask 077
mkdir -p "$folder"
cd "$folder"
for name in reader_token actor_token operator_token grafana_password; do
  [ -s "$name" ] || password >"$name"
done
# All or none: the users' file holds the hashes of the passwords in the other three.
if [ ! -s redis_users ]; then
  users=$(cat "$template")
  for role in admin learner actor reader; do
    secret=$(password)
    hash=$(printf %s "$secret" | sha256sum | cut -d' ' -f1)
    users=$(printf '%s\n' "$users" | sed "s/@$(printf %s "$role" | tr '[:lower:]' '[:upper:]')@/$hash/")
    case $role in
      reader) printf %s "$secret" >redis_reader_password ;;
      *) echo "ASPO_REDIS__URL=redis://$role:$secret@redis:6379/0" >"$role.env" ;;
    esac
  done
  printf '%s\n' "$users" >redis_users
fi
chmod 0444 ./*
